# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""reduce: sums of squares of one gradient list, in float64, into the scalars."""

from __future__ import annotations

from typing import Any

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]

from wsam_fused.backends.triton.constants import (
    ADAPTIVE,
    AT_RUN_TIME,
    REST,
    ROW,
    SLOT,
    TRITON_DTYPES,
    block_size,
    options,
)
from wsam_fused.backends.triton.walk import (
    address,
    is_last_program,
    last_tensor,
    load,
    segment,
    whole_blocks,
)
from wsam_fused.plan import Geometry, TableRow
from wsam_fused.tensor_list import TensorList

PROGRAMS_PER_PROCESSOR = 4
# Vectors of a thread: more of the memory's latency is hidden by two than by one.
_LOADS = 2
_PARTIALS = 1024


@triton.jit
def _add_squares(
    metric_sq,
    plain_sq,
    g_start,
    w_start,
    index,
    count,
    P: tl.constexpr,
    G: tl.constexpr,
    GEOMETRY: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Add M g^2 and g^2 of one block to the sums, lane by lane."""
    g = load(g_start, index, count, G, tl.float64, WHOLE)
    plain_sq = tl.fma(g, g, plain_sq)
    if GEOMETRY == ADAPTIVE:
        w = load(w_start, index, count, P, tl.float64, WHOLE)
        metric_sq = tl.fma(w * w * g, g, metric_sq)
    return metric_sq, plain_sq


@triton.jit
def _sums_of_chunk(
    table,
    first_tensor,
    tensors,
    chunk,
    chunk_size,
    last,
    gradient,
    P: tl.constexpr,
    G: tl.constexpr,
    GEOMETRY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sums of M g^2 and g^2 over one chunk."""
    metric_sq = tl.zeros((BLOCK,), tl.float64)
    plain_sq = tl.zeros((BLOCK,), tl.float64)
    metric_rest = tl.zeros((REST,), tl.float64)
    plain_rest = tl.zeros((REST,), tl.float64)
    tensor = tl.load(first_tensor + chunk).to(tl.int32)
    while tensor <= last:
        begin, count = segment(table, tensors, tensor, chunk, chunk_size)
        g = address(table, gradient, tensors, tensor, begin, G)
        w = g
        if GEOMETRY == ADAPTIVE:
            w = address(table, ROW.value.PARAM, tensors, tensor, begin, P)
        count = tl.where(g == 0, 0, count)
        whole = whole_blocks(g | w, count, BLOCK)
        for i in range(0, whole, BLOCK):
            index = i + tl.arange(0, BLOCK)
            metric_sq, plain_sq = _add_squares(
                metric_sq, plain_sq, g, w, index, count, P, G, GEOMETRY, True
            )
        for i in range(whole, count, REST):
            index = i + tl.arange(0, REST)
            metric_rest, plain_rest = _add_squares(
                metric_rest, plain_rest, g, w, index, count, P, G, GEOMETRY, False
            )
        tensor += 1
    plain = tl.sum(plain_sq, 0) + tl.sum(plain_rest, 0)
    metric = plain
    if GEOMETRY == ADAPTIVE:
        metric = tl.sum(metric_sq, 0) + tl.sum(metric_rest, 0)
    return metric, plain


@triton.jit
def _sum_of_partials(partials, chunks, BLOCK: tl.constexpr):
    """The sums over all chunks, in an order that depends on their number only."""
    metric_sq = tl.zeros((BLOCK,), tl.float64)
    plain_sq = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, chunks, BLOCK):
        chunk = first + tl.arange(0, BLOCK)
        # From the cache that all processors share: other programs wrote these.
        metric_sq += tl.load(
            partials + 2 * chunk, mask=chunk < chunks, other=0.0, cache_modifier=".cg"
        )
        plain_sq += tl.load(
            partials + 2 * chunk + 1, mask=chunk < chunks, other=0.0, cache_modifier=".cg"
        )
    return tl.sum(metric_sq, 0), tl.sum(plain_sq, 0)


@triton.jit
def _put(slot, total, accumulate):
    tl.store(slot, tl.where(accumulate != 0, tl.load(slot) + total, total))


@triton.jit(do_not_specialize=AT_RUN_TIME)
def _reduce_kernel(
    table,
    first_tensor,
    partials,
    scalars,
    flags,
    tensors,
    chunks,
    chunk_size,
    gradient,
    accumulate,
    P: tl.constexpr,
    G: tl.constexpr,
    GEOMETRY: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTIALS: tl.constexpr,
):
    """scalars[kMetricSq] = sum M(w) g^2 (for g1 only), scalars[kGrad1Sq or kGrad2Sq] = sum g^2.

    Or += for further lists (accumulate).

    operand   row               access
    gradient  kGrad1 or kGrad2  read     a tensor whose address is 0 is left out
    w         kParam            read     only for the adaptive geometry

    Moves 1 element per parameter, 2 for the adaptive geometry. One pair of partial sums per chunk,
    which the program that is last adds: nothing depends on the number of programs.
    """
    chunk = tl.program_id(0)
    while chunk < chunks:
        last = last_tensor(first_tensor, chunk, tensors, chunks)
        metric_sq, plain_sq = _sums_of_chunk(
            table, first_tensor, tensors, chunk, chunk_size, last, gradient, P, G, GEOMETRY, BLOCK
        )
        tl.store(partials + 2 * chunk, metric_sq)
        tl.store(partials + 2 * chunk + 1, plain_sq)
        chunk += tl.num_programs(0)
    if is_last_program(flags):
        metric_total, plain_total = _sum_of_partials(partials, chunks, PARTIALS)
        if gradient == ROW.value.GRAD1:
            _put(scalars + SLOT.value.METRIC_SQ, metric_total, accumulate)
            _put(scalars + SLOT.value.GRAD1_SQ, plain_total, accumulate)
        else:
            _put(scalars + SLOT.value.GRAD2_SQ, plain_total, accumulate)


def launch(tensors: TensorList, programs: int, gradient: TableRow, *, accumulate: bool) -> None:
    """Launch on the current stream of the current device, without waiting for anything."""
    table = tensors.table
    assert table is not None
    key = tensors.key
    adaptive = key.geometry == Geometry.ADAPTIVE and gradient == TableRow.GRAD1
    # Without the metric the parameters are not read: one kernel for each type of gradient.
    dtype = key.dtype if adaptive else tensors.grad_dtype
    geometry = Geometry.ADAPTIVE if adaptive else Geometry.EUCLIDEAN
    _reduce_kernel[(programs,)](
        table.table,
        table.chunks,
        table.partials,
        tensors.shared.scalars,
        tensors.flags,
        table.table.shape[1],
        table.chunks.shape[0],
        table.chunk_size,
        int(gradient),
        int(accumulate),
        **operands(dtype, tensors.grad_dtype, geometry, table.chunk_size),
        **options(PROGRAMS_PER_PROCESSOR),
    )


def operands(
    dtype: torch.dtype, grad_dtype: torch.dtype, geometry: Geometry, chunk_size: int
) -> dict[str, Any]:
    """What the kernel is compiled for."""
    operands_read = 2 if geometry == Geometry.ADAPTIVE else 1
    widest = max(dtype, grad_dtype, key=lambda d: d.itemsize)
    return {
        "P": TRITON_DTYPES[dtype],
        "G": TRITON_DTYPES[grad_dtype],
        "GEOMETRY": int(geometry),
        "BLOCK": block_size(widest, chunk_size, _LOADS // operands_read),
        "PARTIALS": _PARTIALS,
    }
