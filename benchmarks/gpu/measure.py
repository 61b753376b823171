"""Measures one case of the GPU report into its record."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.common import paired, spread
from benchmarks.contenders import GPU_CONTENDERS, ForeachCompiled, Ours, Plain
from benchmarks.contenders.compiled import probe
from benchmarks.gpu.case import Case, too_big
from benchmarks.gpu.clock import Clock, CopyBuffer
from benchmarks.gpu.launches import count_launches, time_operations
from benchmarks.gpu.memory import peak_bytes
from benchmarks.gpu.notes import reason_of
from benchmarks.gpu.record import Record
from benchmarks.gpu.timing import Sample, Timings, time_contenders
from benchmarks.harness import Problem

COMPILED = ForeachCompiled.name


@dataclass(frozen=True)
class Bench:
    """What all measurements of a run share.

    Attributes:
        device: What is measured.
        clock: Its clock.
        record: Where the results go.
        rounds: How many count.
        warmup: Steps before.
        ours: Name of the contender that the others are divided by.
    """

    device: torch.device
    clock: Clock
    record: Record
    rounds: int
    warmup: int
    ours: str

    @property
    def on_gpu(self) -> bool:
        """Whether there is something to profile."""
        return self.device.type == "cuda"


def measure_times(bench: Bench, case: Case, names: Sequence[str]) -> None:
    """Measure times and memory of a case; everyone who cannot be gets a note.

    Args:
        bench: The run.
        case: What is measured.
        names: Who takes part.
    """
    reasons = too_big(case, names, bench.clock.free_bytes())
    for name, reason in reasons.items():
        bench.record.fill(case, name, {"note": reason})
    able = [name for name in names if name not in reasons]
    if bench.on_gpu:
        _measure_memory(bench, case, able)
    timings = _time(bench, case, able)
    for name in able:
        _record_times(bench, case, name, timings)


def _measure_memory(bench: Bench, case: Case, names: Sequence[str]) -> None:
    peaks: dict[str, int] = {}
    for name in names:
        try:
            peaks[name] = peak_bytes(case, name, bench.device)
        except Exception as error:
            # The times may still be had; if not, they say why in the note.
            bench.record.add_problem(f"{case}: peak memory of {name}: {reason_of(error)}")
    copy = case.parameters * case.torch_dtype.itemsize
    for name, peak in peaks.items():
        cells: dict[str, Any] = {"peak_gib": peak / 2**30}
        if Plain.name in peaks:
            cells["peak_extra_copies"] = (peak - peaks[Plain.name]) / copy
        bench.record.add(case, name, cells)


def _time(bench: Bench, case: Case, names: Sequence[str]) -> Timings:
    """Everything large lives only in here."""
    try:
        copy = CopyBuffer(bench.clock)
        problem = Problem(case.sizes, device=bench.device, dtype=case.torch_dtype)
    except torch.OutOfMemoryError as error:
        return Timings(failures={name: reason_of(error) for name in names})
    failures, contenders = {}, []
    for name in names:
        try:
            contenders.append(GPU_CONTENDERS[name](problem.params, case.base_optimizer))
        except Exception as error:
            failures[name] = reason_of(error)
    how = {"rounds": bench.rounds, "warmup": bench.warmup}
    timings = time_contenders(problem, contenders, bench.clock, copy, **how)
    timings.failures.update(failures)
    return timings


def _record_times(bench: Bench, case: Case, name: str, timings: Timings) -> None:
    if name in timings.failures:
        bench.record.fill(case, name, {"note": timings.failures[name]})
        return
    samples = timings.samples[name]
    cells = times_of(case, name, samples, timings)
    for rival, suffix in ((bench.ours, "to_ours"), (Plain.name, "to_plain")):
        if rival in timings.samples:
            others = timings.samples[rival]
            devices = [one.device for one in samples], [one.device for one in others]
            walls = [one.wall for one in samples], [one.wall for one in others]
            cells |= {f"ratio_{suffix}": paired(*devices), f"wall_ratio_{suffix}": paired(*walls)}
    bench.record.fill(case, name, cells)


def times_of(case: Case, name: str, samples: Sequence[Sample], timings: Timings) -> dict[str, Any]:
    """Return the cells that a contender's own samples give."""
    cells: dict[str, Any] = {"rounds": len(samples)}
    for kind in ("device", "host", "wall"):
        found = spread([getattr(sample, kind) for sample in samples])
        cells[f"{kind}_ms"] = found["median_ms"]
        cells[f"{kind}_p20_ms"] = found["p20_ms"]
        cells[f"{kind}_p80_ms"] = found["p80_ms"]
    kept = timings.state_dtypes[name]
    passes = GPU_CONTENDERS[name].passes(case.base_optimizer, case.torch_dtype)
    moved = passes.bytes(case.torch_dtype, kept)
    rates = [moved * case.parameters / sample.device / 1e6 for sample in samples]
    copies = [timings.copy_bytes / sample.copy / 1e6 for sample in samples]
    return {
        **cells,
        "state_dtype": str(kept).removeprefix("torch."),
        "bytes_per_parameter": moved,
        "gb_per_s": statistics.median(rates),
        "copy_gb_per_s": statistics.median(copies),
        "share_of_copy": paired(rates, copies),
    }


def measure_launches(bench: Bench, case: Case, names: Sequence[str]) -> None:
    """Count launches and time the operations of our backends, for those that have times."""
    for name in names:
        if bench.record.row(case, name)["note"]:
            continue
        try:
            bench.record.add(case, name, count_launches(case, name, bench.device))
            if issubclass(GPU_CONTENDERS[name], Ours):
                copy = CopyBuffer(bench.clock)
                rows = time_operations(case, name, bench.clock, copy)
                bench.record.add_operations(case, name, rows)
        except Exception as error:
            bench.record.add_problem(f"{case}: launches of {name}: {reason_of(error)}")


def measure_compiled(bench: Bench, case: Case, limit_s: float, beside: Sequence[str]) -> None:
    """Compile a case in a process of its own and, if it did in time, measure it.

    Args:
        bench: The run.
        case: What is measured.
        limit_s: For the compilation.
        beside: Who is measured once more in the same rounds, so that the ratios hold.
    """
    free = bench.clock.free_bytes()  # the process needs the memory that torch's cache has
    names = [*beside, COMPILED]
    reasons = too_big(case, names, free)
    if reasons:
        bench.record.fill(case, COMPILED, {"note": next(iter(reasons.values()))})
        return
    seconds, note = probe(case.shapes, case.base, limit_s, bench.device.type, case.dtype)
    if note:
        bench.record.fill(case, COMPILED, {"note": note})
        return
    timings = _time(bench, case, names)
    _record_times(bench, case, COMPILED, timings)
    bench.record.add(case, COMPILED, {"compile_s": seconds})
    if bench.on_gpu and COMPILED in timings.samples:
        _measure_memory(bench, case, [Plain.name, COMPILED])
        measure_launches(bench, case, [COMPILED])
    torch.compiler.reset()  # the next case must not count as a recompilation of this one
