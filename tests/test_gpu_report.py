"""The GPU report as far as it runs without a GPU: what it measures, and its dry run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_reports import CASES, HEADER, OPERATIONS

from benchmarks import bench_gpu, gpu_table
from benchmarks.common import GPU, count_of, shapes_of, source_hash
from benchmarks.contenders import BASES, GPU_CONTENDERS, Contender, Ours, OursEager
from benchmarks.gpu import captured, launches, measure
from benchmarks.gpu.case import Case, needed_bytes, plan, too_big
from benchmarks.gpu.clock import Clock, CopyBuffer
from benchmarks.gpu.launches import Kernel, kernels_of, operation_of, per_step
from benchmarks.gpu.machine import slug
from benchmarks.gpu.memory import peak_bytes
from benchmarks.gpu.notes import DIFFERENT
from benchmarks.gpu.parity import disagreeing
from benchmarks.gpu.record import Record
from benchmarks.gpu.timing import time_contenders
from benchmarks.harness import Problem

CPU = torch.device("cpu")

# ---- shape lists, bytes, memory --------------------------------------------------------------


def test_llama_1b_has_the_parameters_of_its_model() -> None:
    shapes = shapes_of("llama-1b")
    assert len(shapes) == 1 + 16 * 9 + 1
    assert count_of(shapes) == 1_235_814_400


def test_bytes_of_a_step() -> None:
    adamw, sgdm = BASES["AdamW"], BASES["SGDM"]
    float32, bfloat16 = torch.float32, torch.bfloat16
    # reduce g1; perturb p, g1 -> p; update p, g1, g2, m, v -> p, m, v
    assert Ours.passes(adamw, float32).bytes(float32, float32) == (1 + 3 + 8) * 4
    assert Ours.passes(sgdm, float32).bytes(float32, float32) == (1 + 3 + 6) * 4
    # perturb writes a copy of w besides, which update reads for p
    assert Ours.passes(adamw, bfloat16).bytes(bfloat16, float32) == (1 + 4 + 4) * 2 + 4 * 4
    for cls in GPU_CONTENDERS.values():
        assert sum(cls.passes(adamw, float32)) == cls.moved(adamw)


def test_cases_come_by_importance() -> None:
    cases = plan(GPU, list(BASES), ["float32", "bfloat16"])
    assert len(cases) == len(set(cases)) == 20
    assert cases[:2] == [Case(s, "AdamW", "float32") for s in ("8x4096x1024", "gpt2-small")]
    assert [case.dtype for case in cases] == ["float32"] * 10 + ["bfloat16"] * 10


def test_who_needs_most_is_left_out_of_a_case_that_does_not_fit() -> None:
    case = Case("llama-1b", "AdamW", "float32")
    names = ["authors", "foreach", "cuda", "plain"]
    assert too_big(case, names, None) == {}
    assert too_big(case, names, 10**15) == {}
    copies = 2 * CopyBuffer.size_for(10**12)
    free = int((needed_bytes(case, names[1:]) + copies) / 0.94)
    reasons = too_big(case, names, free)
    assert list(reasons) == ["authors"]
    assert "does not fit: needs about" in reasons["authors"]
    assert set(too_big(case, names, 10**9)) == set(names)


@pytest.mark.parametrize(
    ("device", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100-sxm4"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("", "unknown"),
    ],
)
def test_file_name_of_a_device(device: str, expected: str) -> None:
    assert slug(device) == expected


# ---- parity, timing, profile -----------------------------------------------------------------


class Nothing(Contender):
    """Makes no step."""

    name = "nothing"

    def first(self) -> None:
        self.take_gradients()

    def second(self) -> None:
        self.take_gradients()


class FailsLater(Ours):
    """Runs out of memory in its third step."""

    name = "fails-later"
    steps = 0

    def first(self) -> None:
        self.steps += 1
        if self.steps == 3:
            raise torch.OutOfMemoryError("no more")
        super().first()


def test_parity_finds_who_computes_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(GPU_CONTENDERS, Nothing.name, Nothing)
    found = disagreeing(["authors", "foreach", "plain", "wsam_fused", "nothing"], CPU)
    assert list(found) == ["nothing"]
    assert found["nothing"].startswith(DIFFERENT)


def test_one_contender_that_fails_does_not_stop_the_others() -> None:
    problem = Problem([(5,), (3, 2)])
    contenders = [cls(problem.params, BASES["AdamW"]) for cls in (OursEager, FailsLater)]
    clock = Clock(CPU)
    copy = CopyBuffer(clock, 1024)
    found = time_contenders(problem, contenders, clock, copy, rounds=4, warmup=1)
    assert found.failures == {"fails-later": "out of device memory"}
    assert list(found.samples) == ["eager"]
    assert len(found.samples["eager"]) == 4
    assert all(value > 0 for sample in found.samples["eager"] for value in sample)


def test_the_states_are_shared_but_not_the_step_counts() -> None:
    problem = Problem([(5,)])
    base = BASES["AdamW"]
    two = [GPU_CONTENDERS[name](problem.params, base) for name in ("authors", "plain")]
    clock = Clock(CPU)
    time_contenders(problem, two, clock, CopyBuffer(clock, 1024), rounds=1, warmup=2)
    first, second = (one.base_state[problem.params[0]] for one in two)
    assert first["exp_avg"] is second["exp_avg"]
    assert first["step"] is not second["step"]
    assert first["step"] == second["step"] == 2 + 1 + 1  # warm-up, device time, host time


def test_kernels_of_a_trace() -> None:
    def event(name: str, category: str, start: float) -> dict[str, Any]:
        return {"name": name, "cat": category, "ts": start, "dur": 2.0}

    trace = [
        event("void wsam::update_kernel<Reduce>(Plan)", "kernel", 5.0),
        event("_reduce_kernel", "kernel", 1.0),
        event("void at::native::reduce_kernel<512>()", "kernel", 2.0),
        event("Memcpy HtoD", "gpu_memcpy", 3.0),
        event("Optimizer.step", "gpu_user_annotation", 0.0),
        {"name": "process_name", "ph": "M"},
    ]
    kernels = kernels_of({"traceEvents": trace})
    assert [kernel.kind for kernel in kernels] == ["kernel", "kernel", "gpu_memcpy", "kernel"]
    found = [operation_of(kernel, OPERATIONS) for kernel in kernels]
    assert found == ["reduce", None, None, "update"]
    assert operation_of(Kernel("wsam::perturb", "gpu_memset", 1.0), OPERATIONS) is None


def test_times_per_step() -> None:
    assert per_step([1.0, 2.0, 3.0, 4.0], 2) == [3.0, 7.0]
    assert per_step([1.0, 2.0, 3.0], 2) == []
    assert per_step([], 2) == []


def test_launches_and_operations_come_from_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[0]._replace(shapes="4x100")
    one = Record(HEADER, [case], ["wsam_fused", "authors"], [], "wsam_fused")
    one.fill(case, "wsam_fused", {})
    steps: list[int] = []

    def recorded(run: Any) -> list[Kernel]:
        run()
        steps.append(1)
        times = len(steps) == 1 or 5  # the second recording is of five steps
        each = [Kernel(f"_{name}_kernel", "kernel", 2.0) for name in OPERATIONS]
        return [*each, Kernel("Memcpy HtoD", "gpu_memcpy", 1.0)] * times

    monkeypatch.setattr(launches, "recorded", recorded)
    monkeypatch.setattr(measure, "CopyBuffer", lambda clock: CopyBuffer(clock, 1024))
    bench = measure.Bench(CPU, Clock(CPU), one, 1, 1, "wsam_fused")
    measure.measure_launches(bench, case, ["wsam_fused", "authors"])
    report = one.as_json({})
    assert report["problems"] == []
    row, not_timed = report["rows"]
    assert "launches" not in not_timed
    assert (row["launches"], row["memory_copies"], row["memory_fills"]) == (3, 1, 0)
    assert [found["operation"] for found in report["operations"]] == list(OPERATIONS)
    update = report["operations"][2]
    assert (update["microseconds"], update["launches"]) == (2.0, 1)
    assert update["gb_per_s"] == pytest.approx(400 * 8 * 4 / 2e-6 / 1e9)


def test_peak_memory_is_above_the_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"memory_allocated": 100, "max_memory_allocated": 350}
    for name in ("memory_allocated", "max_memory_allocated", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda device, name=name: found.get(name))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    assert peak_bytes(Case("3x4", "AdamW", "float32"), "plain", CPU) == 250


def test_a_capture_that_fails_gives_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    found = captured.in_a_process(Case("4x8", "AdamW", "float32"), 1, 60.0)
    assert found == {"note": "failed: RuntimeError: there is no CUDA device"}


# ---- the dry run -----------------------------------------------------------------------------


def dry_run(out: Path, *arguments: str) -> dict[str, Any]:
    given = ["--device", "cpu", "--quick", "--no-compile", "--out", str(out), *arguments]
    path, good = bench_gpu.run(bench_gpu.parse(given), "the command")
    assert good
    assert path == out / "gpu-dry-run.json"
    report = gpu_table.read(path)
    assert path.with_suffix(".md").read_text() == gpu_table.render(report)
    return report


def test_dry_run_writes_json_and_markdown(tmp_path: Path) -> None:
    report = dry_run(tmp_path, "--shapes", "3x8x8", "20x4", "--rounds", "2", "--warmup", "1")
    assert report["source"] == source_hash()
    for key in ("driver", "torch", "triton", "cuda", "nvcc", "python", "git", "date", "command"):
        assert report[key], key
    assert report["copy_gb_per_s"]["median"] > 0
    assert len(report["rows"]) == 2 * 2 * 2 * len(GPU_CONTENDERS)
    rows = {(*gpu_table._case(row), row["contender"]): row for row in report["rows"]}
    for name in ("authors", "foreach", "wsam_fused", "plain"):
        row = rows["3x8x8", "AdamW", "float32", name]
        assert row["note"] == ""
        assert row["parameters"] == 192
        assert row["device_p20_ms"] <= row["device_ms"] <= row["device_p80_ms"]
        for key in ("host_ms", "wall_ms", "gb_per_s", "share_of_copy", "ratio_to_ours"):
            assert row[key] > 0, key
        assert "launches" not in row
    assert rows["20x4", "SGDM", "float32", "wsam_fused"]["ratio_to_ours"] == 1.0
    assert rows["20x4", "SGDM", "bfloat16", "plain"]["state_dtype"] == "bfloat16"
    for name in ("cuda", "triton", "foreach-compiled"):
        assert rows["20x4", "SGDM", "bfloat16", name]["note"]
    assert {check["verdict"] for check in report["checks"]} == {"not measured"}
    text = (tmp_path / "gpu-dry-run.md").read_text()
    assert "A dry run without a GPU" in text
    assert "left out by --no-compile" in text
    for column in gpu_table._HEADER:
        assert column in text


def test_cases_for_which_there_is_no_time_say_so(tmp_path: Path) -> None:
    report = dry_run(tmp_path, "--shapes", "2000x64", "--budget", "0")
    notes = {row["contender"]: row["note"] for row in report["rows"]}
    assert notes["authors"] == notes["plain"] == "out of time"
    assert report["captured"] == [
        {**Case("2000x64", "AdamW", "float32")._asdict(), "note": "out of time"}
    ]
    assert "not measured: out of time" in (tmp_path / "gpu-dry-run.md").read_text()


def test_a_second_run_adds_to_the_first(tmp_path: Path) -> None:
    rounds = ("--rounds", "2", "--warmup", "1", "--bases", "AdamW", "--dtypes", "float32")
    dry_run(tmp_path, "--shapes", "20x4", *rounds)
    report = dry_run(tmp_path, "--shapes", "3x8x8", "20x4", "--budget", "0", *rounds)
    notes = {(row["shapes"], row["contender"]): row["note"] for row in report["rows"]}
    assert notes["20x4", "authors"] == "", "what was measured before is lost"
    assert notes["3x8x8", "authors"] == "out of time"
    report = dry_run(tmp_path, "--shapes", "3x8x8", *rounds)
    notes = {(row["shapes"], row["contender"]): row["note"] for row in report["rows"]}
    assert notes["20x4", "authors"] == notes["3x8x8", "authors"] == ""
    path = tmp_path / "gpu-dry-run.json"
    path.write_text(json.dumps({**report, "source": "other"}))
    report = dry_run(tmp_path, "--shapes", "3x8x8", *rounds)
    assert {row["shapes"] for row in report["rows"]} == {"3x8x8"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cpu"], "--out must be another folder"),
        (["--device", "cpu", "--out", "x", "--shapes", "many"], "shapes is 'many', expected"),
    ],
)
def test_wrong_arguments(
    arguments: Sequence[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        bench_gpu.parse(arguments)
    assert message in capsys.readouterr().err
