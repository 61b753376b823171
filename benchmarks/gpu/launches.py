"""Counts what a step launches and times each operation, with torch's profiler."""

from __future__ import annotations

import gc
import json
import statistics
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.contenders import GPU_CONTENDERS, Contender, Ours
from benchmarks.gpu.case import Case
from benchmarks.gpu.clock import Clock, CopyBuffer
from benchmarks.gpu.timing import state_dtype
from benchmarks.harness import Problem

_STEPS = 5
_WARMUP = 2


class Kernel(NamedTuple):
    """One piece of work of the device.

    Attributes:
        name: As the profiler shows it.
        kind: ``kernel``, ``gpu_memcpy`` or ``gpu_memset``.
        microseconds: How long it ran.
    """

    name: str
    kind: str
    microseconds: float


def recorded(run: Callable[[], object]) -> list[Kernel]:
    """Return what the device does during ``run``."""
    torch.cuda.synchronize()
    # acc_events: without it torch 2.11 warns that a second cycle would clear the first.
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as recording:
        run()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        recording.export_chrome_trace(str(path))
        return kernels_of(json.loads(path.read_text()))


def kernels_of(trace: dict[str, Any]) -> list[Kernel]:
    """Return the device's work in a trace, in order; ranges that only name things are none."""
    kinds = ("kernel", "gpu_memcpy", "gpu_memset")
    events = [event for event in trace["traceEvents"] if event.get("cat") in kinds]
    events.sort(key=lambda event: float(event["ts"]))
    return [Kernel(event["name"], event["cat"], float(event["dur"])) for event in events]


def per_step(values: Sequence[float], steps: int) -> list[float]:
    """Return the sum within each of ``steps`` equal parts; none if they are not equal."""
    each, rest = divmod(len(values), steps)
    if rest or not each:
        return []
    return [sum(values[k * each : (k + 1) * each]) for k in range(steps)]


def operation_of(kernel: Kernel, operations: Sequence[str]) -> str | None:
    """Return which of our operations a kernel belongs to; none where it is one of torch's."""
    if kernel.kind != "kernel" or "at::" in kernel.name:
        return None
    places = {kernel.name.lower().find(one): one for one in operations}
    places.pop(-1, None)
    # The first: what comes later in a name are arguments of its template.
    return places[min(places)] if places else None


def count_launches(case: Case, name: str, device: torch.device) -> dict[str, int]:
    """Return the kernels, copies and fills of one step of a contender.

    Raises:
        RuntimeError: The profiler saw nothing.
    """
    problem, one = _warm(case, name, device)
    kinds = Counter(kernel.kind for kernel in recorded(lambda: _step(problem, one)))
    if not kinds["kernel"]:
        raise RuntimeError("the profiler recorded no kernel")
    return {
        "launches": kinds["kernel"],
        "memory_copies": kinds["gpu_memcpy"],
        "memory_fills": kinds["gpu_memset"],
    }


def time_operations(case: Case, name: str, clock: Clock, copy: CopyBuffer) -> list[dict[str, Any]]:
    """Return the time of each operation of one of our backends.

    Args:
        case: What is measured.
        name: One of our contenders.
        clock: Of the device.
        copy: The yardstick, which also evicts the data of a half from the caches.

    Returns:
        A row per operation: its microseconds per step (the median of some steps), its kernels,
        and its bandwidth against that of the copies between these steps.

    Raises:
        RuntimeError: No kernel has the name of an operation.
    """
    cls = GPU_CONTENDERS[name]
    assert issubclass(cls, Ours)
    problem, one = _warm(case, name, clock.device)
    passes = cls.operations(case.base_optimizer, case.torch_dtype)
    kept = state_dtype(one, problem.params[0])
    copied = statistics.median(copy.rates(2 * _STEPS))

    def run() -> None:
        for _ in range(_STEPS):
            _step(problem, one, copy.run)

    seen = recorded(run)
    rows = []
    for operation, moved in passes.items():
        found = [k for k in seen if operation_of(k, tuple(passes)) == operation]
        times = per_step([k.microseconds for k in found], _STEPS)
        if not times:
            names = sorted({k.name for k in seen if k.kind == "kernel"})
            raise RuntimeError(
                f"{len(found)} kernels in {_STEPS} steps are called {operation!r}, expected as "
                f"many in each; all: {', '.join(names)[:200]}"
            )
        bytes_moved = moved.bytes(case.torch_dtype, kept)
        rate = bytes_moved * case.parameters / statistics.median(times) / 1e3
        rows.append(
            {
                "operation": operation,
                "microseconds": statistics.median(times),
                "launches": len(found) // _STEPS,
                "bytes_per_parameter": bytes_moved,
                "gb_per_s": rate,
                "share_of_copy": rate / copied,
            }
        )
    return rows


def _warm(case: Case, name: str, device: torch.device) -> tuple[Problem, Contender]:
    gc.collect()
    torch.cuda.empty_cache()
    problem = Problem(case.sizes, device=device, dtype=case.torch_dtype)
    one = GPU_CONTENDERS[name](problem.params, case.base_optimizer)
    for _ in range(_WARMUP):
        _step(problem, one)
    return problem, one


def _step(problem: Problem, one: Contender, before: Callable[[], object] = lambda: None) -> None:
    """Step with gradients that are not copied anew: that copy would be counted, too."""
    for param, grad in zip(problem.params, problem.g1, strict=True):
        param.grad = grad
    before()
    one.first()
    if one.gradients > 1:
        for param, grad in zip(problem.params, problem.g2, strict=True):
            param.grad = grad
        before()
        one.second()
