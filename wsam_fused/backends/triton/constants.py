"""What of :mod:`wsam_fused.plan` the kernels name, as Triton wants it: constexpr."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Iterable
from typing import Any

import torch
import triton.language as tl  # type: ignore[import-untyped]

from wsam_fused.base_rules import BaseRule
from wsam_fused.plan import Geometry, GroupRow, Point, Slot, TableRow


def _named(names: Iterable[str]) -> Any:
    """Number names from 0, for kernels as ``X.value.NAME``.

    Triton compares every global that a kernel names at every launch, about 0.8 us each (measured
    on a slow host): one object for many constants.
    """
    fields = list(names)
    return tl.constexpr(namedtuple("Numbers", fields)(*range(len(fields))))


ROW = _named(row.name for row in TableRow)
COLUMN = _named(GroupRow._fields)
COLUMNS = tl.constexpr(len(GroupRow._fields))
SLOT = _named(slot.name for slot in Slot)
# Of a list, as in csrc/plan.h: the point where it is, and how many programs are done.
FLAG = _named(["AT", "ARRIVED"])
POINT = _named(point.name for point in Point)
RULES = _named(rule.name for rule in BaseRule)
# What a perturbation goes along: M g1 of a metric, or the noise of the probe.
DIRECTION = _named([*(geometry.name for geometry in Geometry), "NOISE"])
# What the first of the two sums of reduce is of: g^2, M g^2 or g1 g.
PAIRING = _named([*(geometry.name for geometry in Geometry), "WITH_FIRST"])

LARGEST_FLOAT = tl.constexpr(torch.finfo(torch.float32).max)
LARGEST_DOUBLE = tl.constexpr(torch.finfo(torch.float64).max)

VECTOR_BYTES = 16
WARPS = 8
THREADS = 32 * WARPS
# Elements of a block that is not whole: one per thread.
REST = tl.constexpr(THREADS)
# Of a multiprocessor, from the A100 on.
REGISTERS = 65536
# Arguments whose values compile nothing anew: all that are not constexpr.
AT_RUN_TIME = [
    "table",
    "first_tensor",
    "groups",
    "partials",
    "scalars",
    "flags",
    "steps",
    "tensors",
    "chunks",
    "chunk_size",
    "target",
    "gradient",
    "other",
    "accumulate",
    "required",
    "checked",
    "keep_point",
    "count_skipped",
    "rounding_seed",
]
TRITON_DTYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype that elements are computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def block_size(dtype: torch.dtype, chunk_size: int, vectors: int = 1) -> int:
    """Elements of a block: some vectors of ``dtype`` for each thread, but no more than a chunk."""
    return min(vectors * THREADS * VECTOR_BYTES // dtype.itemsize, chunk_size)


def options(programs_per_processor: int) -> dict[str, Any]:
    """With which options a kernel is compiled.

    Args:
        programs_per_processor: How many are launched for each multiprocessor. They all have to fit
            at once: one that came after the others had ended would double the time.
    """
    # A fused multiply-add is written where one is wanted.
    chosen: dict[str, Any] = {"num_warps": WARPS, "enable_fp_fusion": False}
    if torch.version.hip is None:
        chosen["maxnreg"] = REGISTERS // (THREADS * programs_per_processor) // 8 * 8
    return chosen
