# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""reduce: two sums over one gradient list, in float64, into the scalars."""

from __future__ import annotations

from typing import Any

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]

from wsam_fused.backends.triton.constants import (
    AT_RUN_TIME,
    COLUMNS,
    PAIRING,
    REST,
    ROW,
    SLOT,
    TRITON_DTYPES,
    block_size,
    options,
)
from wsam_fused.backends.triton.math import metric, scaled_eta
from wsam_fused.backends.triton.walk import (
    address,
    cell,
    is_last_program,
    last_tensor,
    load,
    segment,
    whole_blocks,
)
from wsam_fused.plan import Geometry, TableRow
from wsam_fused.tensor_list import TensorList

# Vectors of a thread: more of the memory's latency is hidden by two than by one.
_LOADS = 2
_PARTIALS = 1024


@triton.jit
def _add_products(
    first,
    plain_sq,
    g_start,
    other_start,
    eta,
    index,
    count,
    P: tl.constexpr,
    G: tl.constexpr,
    PAIR: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Add the two products of one block to the sums, lane by lane."""
    g = load(g_start, index, count, G, tl.float64, WHOLE)
    plain_sq = tl.fma(g, g, plain_sq)
    if PAIR == PAIRING.value.WITH_FIRST:
        first = tl.fma(load(other_start, index, count, P, tl.float64, WHOLE), g, first)
    elif PAIR == PAIRING.value.ADAPTIVE:
        w = load(other_start, index, count, P, tl.float64, WHOLE)
        first = tl.fma(metric(w, g, eta, PAIR, tl.float64) * g, g, first)
    elif PAIR == PAIRING.value.FISHER:
        first = tl.fma(metric(g, g, eta, PAIR, tl.float64) * g, g, first)
    return first, plain_sq


@triton.jit
def _sums_of_chunk(
    table,
    first_tensor,
    groups,
    tensors,
    chunk,
    chunk_size,
    last,
    gradient,
    other_row,
    scalars,
    P: tl.constexpr,
    G: tl.constexpr,
    PAIR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The two sums over one chunk."""
    first = tl.zeros((BLOCK,), tl.float64)
    plain_sq = tl.zeros((BLOCK,), tl.float64)
    first_rest = tl.zeros((REST,), tl.float64)
    plain_rest = tl.zeros((REST,), tl.float64)
    tensor = tl.load(first_tensor + chunk).to(tl.int32)
    while tensor <= last:
        begin, count = segment(table, tensors, tensor, chunk, chunk_size)
        g = address(table, gradient, tensors, tensor, begin, G)
        other = g
        if PAIR == PAIRING.value.ADAPTIVE or PAIR == PAIRING.value.WITH_FIRST:
            other = address(table, other_row, tensors, tensor, begin, P)
        count = tl.where((g == 0) | (other == 0), 0, count)
        group = groups + cell(table, ROW.value.GROUP, tensors, tensor) * COLUMNS
        eta = scaled_eta(scalars, group, PAIR)
        whole = whole_blocks(g | other, count, BLOCK)
        for i in range(0, whole, BLOCK):
            index = i + tl.arange(0, BLOCK)
            first, plain_sq = _add_products(
                first, plain_sq, g, other, eta, index, count, P, G, PAIR, True
            )
        for i in range(whole, count, REST):
            index = i + tl.arange(0, REST)
            first_rest, plain_rest = _add_products(
                first_rest, plain_rest, g, other, eta, index, count, P, G, PAIR, False
            )
        tensor += 1
    plain = tl.sum(plain_sq, 0) + tl.sum(plain_rest, 0)
    total = plain
    if PAIR != PAIRING.value.EUCLIDEAN:
        total = tl.sum(first, 0) + tl.sum(first_rest, 0)
    return total, plain


@triton.jit
def _sum_of_partials(partials, chunks, BLOCK: tl.constexpr):
    """The sums over all chunks, in an order that depends on their number only."""
    first_sum = tl.zeros((BLOCK,), tl.float64)
    plain_sq = tl.zeros((BLOCK,), tl.float64)
    for begin in range(0, chunks, BLOCK):
        chunk = begin + tl.arange(0, BLOCK)
        # From the cache that all processors share: other programs wrote these.
        first_sum += tl.load(
            partials + 2 * chunk, mask=chunk < chunks, other=0.0, cache_modifier=".cg"
        )
        plain_sq += tl.load(
            partials + 2 * chunk + 1, mask=chunk < chunks, other=0.0, cache_modifier=".cg"
        )
    return tl.sum(first_sum, 0), tl.sum(plain_sq, 0)


@triton.jit
def _put(slot, total, accumulate):
    tl.store(slot, tl.where(accumulate != 0, tl.load(slot) + total, total))


@triton.jit(do_not_specialize=AT_RUN_TIME)
def _reduce_kernel(
    table,
    first_tensor,
    groups,
    partials,
    scalars,
    flags,
    tensors,
    chunks,
    chunk_size,
    gradient,
    other,
    accumulate,
    P: tl.constexpr,
    G: tl.constexpr,
    PAIR: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTIALS: tl.constexpr,
):
    """Write two sums over one gradient list, or add them (accumulate).

    first gradient    scalars[kMetricSq] = sum M(w, g) g^2,   scalars[kGrad1Sq] = sum g^2
    others            scalars[kDot12] = sum g1 g (WITH_FIRST), scalars[kGrad2Sq or 3] = sum g^2

    operand   row               access
    gradient  kGrad1..kGrad3    read     a tensor whose address is 0 is left out
    other     kParam, kBackup   read     w or float32 weights, only for the adaptive geometry
              kGrad1            read     g1, only WITH_FIRST; likewise

    Moves 1 element per parameter, 2 where another operand is read. One pair of partial sums per
    chunk, which the program that is last adds: nothing depends on the number of programs.
    """
    chunk = tl.program_id(0)
    while chunk < chunks:
        last = last_tensor(first_tensor, chunk, tensors, chunks)
        # fmt: off
        first, plain_sq = _sums_of_chunk(
            table, first_tensor, groups, tensors, chunk, chunk_size, last, gradient, other, scalars,
            P, G, PAIR, BLOCK,
        )
        # fmt: on
        tl.store(partials + 2 * chunk, first)
        tl.store(partials + 2 * chunk + 1, plain_sq)
        chunk += tl.num_programs(0)
    if is_last_program(flags):
        first_total, plain_total = _sum_of_partials(partials, chunks, PARTIALS)
        if gradient == ROW.value.GRAD1:
            _put(scalars + SLOT.value.METRIC_SQ, first_total, accumulate)
        if PAIR == PAIRING.value.WITH_FIRST:
            _put(scalars + SLOT.value.DOT12, first_total, accumulate)
        plain_slot = SLOT.value.GRAD1_SQ + gradient - ROW.value.GRAD1
        _put(scalars + plain_slot, plain_total, accumulate)


def launch(
    tensors: TensorList, programs: int, gradient: TableRow, pairing: int, *, accumulate: bool
) -> None:
    """Launch on the current stream of the current device, without waiting for anything."""
    table = tensors.table
    assert table is not None
    _reduce_kernel[(programs,)](
        table.table,
        table.chunks,
        tensors.shared.groups,
        table.partials,
        tensors.shared.scalars,
        tensors.flags,
        table.table.shape[1],
        table.chunks.shape[0],
        table.chunk_size,
        int(gradient),
        int(_other_row(gradient, has_master=tensors.key.has_master)),
        int(accumulate),
        **operands(
            torch.float32 if tensors.key.has_master else tensors.key.dtype,
            tensors.grad_dtype,
            pairing,
            table.chunk_size,
        ),
        **options(programs_per_processor(tensors.grad_dtype, pairing)),
    )


def _other_row(gradient: TableRow, *, has_master: bool) -> TableRow:
    """Where the operand is that some pairings read besides the gradient."""
    if gradient != TableRow.GRAD1:
        return TableRow.GRAD1
    return TableRow.BACKUP if has_master else TableRow.PARAM


def _sums_squares(pairing: int) -> bool:
    """Whether there is one operand, and nothing but its squares to sum."""
    return bool(pairing == PAIRING.value.EUCLIDEAN)


def programs_per_processor(grad_dtype: torch.dtype, pairing: int) -> int:
    """How many share a multiprocessor: as many as leave them the registers that they need.

    A vector of gradients of 16 bits is eight numbers of float64, and sixteen with another operand.
    """
    if _sums_squares(pairing):
        return 4
    return 2 if grad_dtype.itemsize == 2 else 3


def pairing_of(gradient: TableRow, geometry: Geometry, *, with_first: bool) -> int:
    """Return what the first of the two sums is of."""
    if gradient == TableRow.GRAD1:
        return int(geometry)
    return int(PAIRING.value.WITH_FIRST if with_first else PAIRING.value.EUCLIDEAN)


def operands(
    dtype: torch.dtype, grad_dtype: torch.dtype, pairing: int, chunk_size: int
) -> dict[str, Any]:
    """What the kernel is compiled for; ``dtype`` is that of w where it is read."""
    # Where the parameters are not read, one kernel for each type of gradient.
    other = dtype if pairing == PAIRING.value.ADAPTIVE else grad_dtype
    widest = max(other, grad_dtype, key=lambda d: d.itemsize)
    return {
        "P": TRITON_DTYPES[other],
        "G": TRITON_DTYPES[grad_dtype],
        "PAIR": pairing,
        "BLOCK": block_size(widest, chunk_size, _LOADS if _sums_squares(pairing) else 1),
        "PARTIALS": _PARTIALS,
    }
