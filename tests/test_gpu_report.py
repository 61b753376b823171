"""The GPU report as far as it runs without a GPU: its dry run, table, checks, stages and script."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import bench_gpu, gpu_small_case, gpu_table
from benchmarks.common import GPU, ROOT, count_of, shapes_of, source_hash
from benchmarks.contenders import BASES, GPU_CONTENDERS, Contender, Ours, OursEager
from benchmarks.gpu import captured, checks, launches, measure, stages
from benchmarks.gpu.case import Case, needed_bytes, plan, too_big
from benchmarks.gpu.clock import Clock, CopyBuffer
from benchmarks.gpu.launches import Kernel, kernels_of, operation_of, per_step
from benchmarks.gpu.machine import slug
from benchmarks.gpu.memory import peak_bytes
from benchmarks.gpu.notes import DIFFERENT
from benchmarks.gpu.parity import disagreeing
from benchmarks.gpu.record import Record, with_checks
from benchmarks.gpu.timing import time_contenders
from benchmarks.harness import Problem

CPU = torch.device("cpu")
SCRIPT = ROOT / "benchmarks" / "gpu_report.sh"
OPERATIONS = ("reduce", "perturb", "update")


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


@pytest.mark.parametrize("rule", ["adamw", gpu_small_case.FOREIGN])
def test_small_case_compares(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    row = gpu_small_case.Row(torch.float32, rule, "wsam", "plain")
    assert gpu_small_case.compare(row, "auto", CPU) == gpu_small_case.STEPS
    make = gpu_small_case.Row.make

    def other(row: Any, params: Any, backend: str) -> Any:
        return make(row._replace(method="sam" if backend == "auto" else "wsam"), params, backend)

    monkeypatch.setattr(gpu_small_case.Row, "make", other)
    with pytest.raises(AssertionError, match="parameter 0 of step 1"):
        gpu_small_case.compare(row, "auto", CPU)


def test_small_case_refuses_a_backend_that_is_not_there(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        gpu_small_case.main(["--backends", "abacus"])
    assert "--backends has 'abacus', expected some of" in capsys.readouterr().err


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


# ---- checks and table ------------------------------------------------------------------------

HEADER = {
    "device": "NVIDIA H100 80GB HBM3",
    "slug": "h100",
    "timer": "CUDA events",
    "capability": "9.0",
    "memory_gib": 79.0,
    "l2_mib": 50.0,
    "multiprocessors": 132,
    **dict.fromkeys(("torch", "triton", "cuda", "driver", "nvcc", "python"), "1.2.3"),
    **dict.fromkeys(("git", "source", "date", "command"), "some"),
    "copy_gb_per_s": {"median": 3000.0, "p20": 2990.0, "p80": 3010.0},
    "copy_bytes": 2**32,
}
STAGES = {
    "build": {"exit": 0, "seconds": 61.0, "built_s": 60.0},
    "tests": {
        "exit": 0, "seconds": 100.0, "passed": 5, "skipped": 1, "failures": 0,
        "files_not_collected": 1,
    },
    "sanitize": {
        "exit": 0, "seconds": 9.0, "failures": 0,
        "runs": [{"name": "memcheck cuda", "exit": 0, "errors": 0, "steps": 8}],
    },
}  # fmt: skip
CASES = plan(GPU, list(BASES), ["float32", "bfloat16"])
CAPTURED = [Case("2000x64", "AdamW", "float32")]


def record() -> Record:
    names = [name for name in GPU_CONTENDERS if name != "wsam_fused"]
    return Record(HEADER, CASES, names, CAPTURED, "cuda")


def filled(*, good: bool) -> dict[str, Any]:
    """Return a report whose numbers are all as wanted, or all just not."""
    off = 0.0 if good else 0.01
    one = record()
    for number, case in enumerate(CASES):
        for name in ("authors", "foreach", "triton", "cuda", "plain"):
            ratio = {"authors": 4.0 - off, "foreach": 1.4 - off, "triton": 1.1 + off}.get(name, 1.0)
            times = {f"{k}_ms": 1.0 for k in ("device_p20", "device_p80", "wall", "device")}
            cells = {
                **times,
                "host_ms": 1.5 + off,
                "ratio_to_ours": ratio,
                "wall_ratio_to_ours": 40.0 - off,
                "share_of_copy": 0.85 - off,
                "gb_per_s": 2550.0,
                "copy_gb_per_s": 3000.0,
                "rounds": 20,
                "bytes_per_parameter": 48,
                "state_dtype": "float32",
                "launches": 6 if good else 7 + number,
                "memory_copies": 1,
                "memory_fills": 0,
                "peak_gib": 1.0,
            }
            one.fill(case, name, cells)
        for operation in OPERATIONS:
            cells = {"operation": operation, "share_of_copy": 0.9 - off, "microseconds": 5.0}
            cells |= {"launches": 1, "bytes_per_parameter": 4, "gb_per_s": 2700.0}
            one.add_operations(case, "cuda", [cells])
    of_captured = {f"device_{key}_ms": 0.05 for key in ("median", "p20", "p80")}
    of_captured |= {f"host_{key}_ms": 0.1 + off for key in ("median", "p20", "p80")}
    one.fill_captured(CAPTURED[0], of_captured)
    results: dict[str, Any] = json.loads(json.dumps(STAGES))
    if not good:
        results["build"]["built_s"] = 181.0
        results["tests"]["failures"] = results["sanitize"]["failures"] = 1
    return one.as_json(results)


FULL = filled(good=True)


@pytest.mark.parametrize(("good", "verdict"), [(True, "reached"), (False, "NOT REACHED")])
def test_every_check_tells_reached_from_not_reached(good: bool, verdict: str) -> None:
    report = filled(good=good)
    assert len(report["checks"]) == len(checks.CHECKS) > 40
    others = [check for check in report["checks"] if check["verdict"] != verdict]
    assert others == []


@pytest.mark.parametrize("check", checks.CHECKS, ids=lambda check: f"{check.where}: {check.wanted}")
def test_every_check_says_why_it_is_not_measured(check: checks.Check) -> None:
    missing = check.find({})
    assert missing.value is None
    assert missing.reason
    assert check.find(FULL).value is not None


def test_a_missing_rival_is_not_measured_with_its_own_reason() -> None:
    report = filled(good=True)
    for row in report["rows"]:
        if row["contender"] == "authors" and row["shapes"] == "llama-1b":
            row["note"] = "does not fit"
            del row["ratio_to_ours"]
    found = [c for c in with_checks(report)["checks"] if c["verdict"] == "not measured"]
    assert [(c["shapes"], c["measured"]) for c in found] == [
        ("llama-1b, AdamW, float32", "does not fit")
    ]


def test_table_of_a_full_report() -> None:
    text = gpu_table.render(filled(good=True))
    assert text.startswith("# WSAM on NVIDIA H100 80GB HBM3\n")
    assert "dry run" not in text
    assert "60 s from a clean tree" in text
    assert "5 passed, 0 failed, 1 skipped; 1 files need what is not installed" in text
    assert "memcheck cuda: 0 errors, 8 steps, exit code 0" in text
    assert "6, 1 copies, 0 fills" in text
    # Never filled: its row is there all the same.
    assert "| foreach-compiled | not measured: out of time" in text
    assert "| gpt2-small, SGDM, bfloat16 " in text.split("## Operations of a step")[1]
    assert text.count("\n### ") == len(CASES)


def test_table_of_an_empty_report() -> None:
    text = gpu_table.render(record().as_json({}))
    assert "| build    | not run" in text
    assert "reached" not in text.lower()
    assert "Not measured." in text.split("## Operations of a step")[1]


def test_a_fault_is_told_from_a_lack() -> None:
    one = record()
    assert not one.has_failures()
    one.fill(CASES[0], "cuda", {"note": "failed: RuntimeError: launch"})
    assert one.has_failures()
    another = record()
    another.add_problem("something")
    assert another.has_failures()
    assert "* something" in gpu_table.render(another.as_json({}))


# ---- stages and script -----------------------------------------------------------------------

SANITIZE_LOG = """\
== run: memcheck cuda
compared 6 steps, 0 rows differ
========= ERROR SUMMARY: 0 errors
== exit: 0
== run: racecheck cuda
compared 6 steps, 0 rows differ
========= RACECHECK SUMMARY: 3 hazards displayed (3 errors, 0 warnings)
== exit: 9
== run: memcheck triton
== exit: 124
"""
TESTS_XML = """\
<testsuites><testsuite>
<testcase name="a"/><testcase name="b"><skipped/></testcase><testcase name="c"><failure/></testcase>
<testcase name="d"><error message="collection failure">ModuleNotFoundError: x</error></testcase>
<testcase name="e"><error message="collection failure">SyntaxError: x</error></testcase>
</testsuite></testsuites>
"""


def test_stages_read_their_logs(tmp_path: Path) -> None:
    (tmp_path / "sanitize.log").write_text(SANITIZE_LOG)
    found = stages.result_of("sanitize", tmp_path)
    assert [run["errors"] for run in found["runs"]] == [0, 3, None]
    assert [run["steps"] for run in found["runs"]] == [6, 6, None]
    assert found["failures"] == 2
    (tmp_path / "tests.xml").write_text(TESTS_XML)
    expected = {"passed": 1, "skipped": 1, "failures": 2, "files_not_collected": 1}
    assert stages.result_of("tests", tmp_path) == expected
    assert stages.result_of("build", tmp_path) == {"built_s": None}
    (tmp_path / "build.log").write_text("compiling\n== built in 61.5 s\n")
    assert stages.result_of("build", tmp_path) == {"built_s": 61.5}


def test_a_report_takes_in_stages_of_its_own_sources_and_device_only(tmp_path: Path) -> None:
    report = record().as_json({})
    path = tmp_path / "gpu-h100.json"
    path.write_text(json.dumps(report))
    (tmp_path / "stage-sanitize.json").write_text(
        json.dumps({**STAGES["sanitize"], "source": HEADER["source"], "device": "NVIDIA H200"})
    )
    for stage, source in (("build", HEADER["source"]), ("tests", "other")):
        result = {**STAGES[stage], "source": source, "device": HEADER["device"]}
        (tmp_path / f"stage-{stage}.json").write_text(json.dumps(result))
    gpu_table.main(["--update", str(path)])
    assert list(gpu_table.read(path)["stages"]) == ["build"]
    assert "60 s from a clean tree" in path.with_suffix(".md").read_text()


def executable(path: Path, text: str) -> str:
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


def run_script(tmp_path: Path, python: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "PYTHON": executable(tmp_path / "python", python),
        "OUT": str(tmp_path / "out"),
        "SANITIZER": executable(tmp_path / "sanitizer", "#!/bin/sh\necho stub\n"),
    }
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments], env=environment, capture_output=True, text=True
    )


def test_script_parses_and_refuses_unknown_stages(tmp_path: Path) -> None:
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)
    run = run_script(tmp_path, "#!/bin/sh\nexit 1\n", "build", "polish")
    assert run.returncode == 2
    assert "stage is 'polish', expected some of: build tests sanitize bench" in run.stderr


def test_script_goes_on_after_a_stage_that_fails(tmp_path: Path) -> None:
    library = sorted((ROOT / "wsam_fused").glob("_C*.so"))
    python = f"""#!/bin/sh
case "$*" in
  *setup.py*) echo "cannot compile"; exit 3 ;;
  *wsam_fused|*"import pytest_benchmark"*) ;;
  *"-m pytest"*) echo "all is well" ;;
  *) exec {sys.executable} "$@" ;;
esac
"""
    run = run_script(tmp_path, python, "build", "tests")
    assert run.returncode == 1, run.stderr
    assert "failed: build\n" in run.stderr
    out = tmp_path / "out"
    assert "cannot compile" in (out / "build.log").read_text()
    assert "all is well" in (out / "tests.log").read_text()
    results = [json.loads((out / f"stage-{s}.json").read_text()) for s in ("build", "tests")]
    assert [result["exit"] for result in results] == [3, 0]
    assert {result["source"] for result in results} == {source_hash()}
    # What worked before is still there.
    assert sorted((ROOT / "wsam_fused").glob("_C*.so")) == library
