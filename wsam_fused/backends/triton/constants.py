"""What of :mod:`wsam_fused.plan` the kernels name, as Triton wants it: constexpr."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Iterable
from typing import Any

import torch
import triton.language as tl  # type: ignore[import-untyped]

from wsam_fused.base_rules import BaseRule
from wsam_fused.plan import Geometry, GroupRow, Slot, TableRow


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
# Of a list, as in csrc/plan.h: is it perturbed?, and how many programs are done.
FLAG = _named(["PERTURBED", "ARRIVED"])
RULES = _named(rule.name for rule in BaseRule)
ADAPTIVE = tl.constexpr(int(Geometry.ADAPTIVE))

LARGEST_FLOAT = tl.constexpr(torch.finfo(torch.float32).max)
LARGEST_DOUBLE = tl.constexpr(torch.finfo(torch.float64).max)

VECTOR_BYTES = 16
WARPS = 8
THREADS = 32 * WARPS
# Elements of a block that is not whole: one per thread.
REST = tl.constexpr(THREADS)
# Every kernel is launched with these. A fused multiply-add is written where one is wanted.
OPTIONS = {"num_warps": WARPS, "enable_fp_fusion": False}
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
    "gradient",
    "accumulate",
    "check_second",
    "count_skipped",
]
TRITON_DTYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype that elements are computed in, and of the states."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def block_size(dtype: torch.dtype) -> int:
    """Elements of a block: a vector of ``dtype`` for each thread."""
    return THREADS * VECTOR_BYTES // dtype.itemsize
