"""GPU reports that nobody measured: all figures as wanted, or all just not."""

from __future__ import annotations

import json
from typing import Any

from benchmarks.common import GPU
from benchmarks.contenders import BASES, GPU_CONTENDERS
from benchmarks.gpu.case import Case, plan
from benchmarks.gpu.record import Record

OPERATIONS = ("reduce", "perturb", "update")
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
