# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""perturb: from one point to another."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]

from wsam_fused.backends.triton.constants import (
    AT_RUN_TIME,
    COLUMNS,
    DIRECTION,
    FLAG,
    POINT,
    REST,
    ROW,
    SLOT,
    TRITON_DTYPES,
    block_size,
    compute_dtype,
    options,
)
from wsam_fused.backends.triton.math import (
    is_finite,
    noise_at,
    noise_of_tensor,
    perturbed,
    recomputed,
    scale_at,
    scaled_eta,
)
from wsam_fused.backends.triton.walk import (
    address,
    cell,
    is_last_program,
    last_tensor,
    load,
    segment,
    store,
    whole_blocks,
)
from wsam_fused.plan import Geometry, Point
from wsam_fused.tensor_list import TensorList

PROGRAMS_PER_PROCESSOR = 5


@triton.jit
def restore_block(
    p,
    source,
    g1,
    scale,
    index,
    count,
    P: tl.constexpr,
    W: tl.constexpr,
    G: tl.constexpr,
    T: tl.constexpr,
    HAS_BACKUP: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Put w back: w = fma(-s, g1, p), or the backup or float32 weights, the source then."""
    w = load(source, index, count, W, T, WHOLE)
    if not HAS_BACKUP:
        w = recomputed(w, load(g1, index, count, G, T, WHOLE), scale)
    store(p, index, count, w, P, WHOLE)


@triton.jit
def _move_block(
    p,
    source,
    backup,
    g1,
    move,
    index,
    count,
    P: tl.constexpr,
    W: tl.constexpr,
    G: tl.constexpr,
    T: tl.constexpr,
    GEOMETRY: tl.constexpr,
    HAS_BACKUP: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """To another point than w."""
    w = load(source, index, count, W, T, WHOLE)
    if GEOMETRY == DIRECTION.value.NOISE:
        g = noise_at(move.noise, move.begin, index, T)
    else:
        g = load(g1, index, count, G, T, WHOLE)
    if HAS_BACKUP:
        if W == P:  # else it is the float32 weights, which are w anyway
            if move.keeps:  # in memory that may be that of g1, which has been read
                store(backup, index, count, w, P, WHOLE)
    else:
        w = recomputed(w, g, move.scale_from)
    store(p, index, count, perturbed(w, g, move.scale_to, move.eta, GEOMETRY, T), P, WHOLE)


class Move(NamedTuple):
    """What is the same for all elements of a segment."""

    scale_from: Any
    scale_to: Any
    eta: Any
    keeps: Any  # whether w is copied to the backup
    noise: Any
    begin: Any


@triton.jit
def _block(
    p,
    source,
    backup,
    g1,
    move,
    index,
    count,
    P: tl.constexpr,
    W: tl.constexpr,
    G: tl.constexpr,
    T: tl.constexpr,
    GEOMETRY: tl.constexpr,
    HAS_BACKUP: tl.constexpr,
    TO_WEIGHTS: tl.constexpr,
    WHOLE: tl.constexpr,
):
    if TO_WEIGHTS:
        restore_block(p, source, g1, move.scale_from, index, count, P, W, G, T, HAS_BACKUP, WHOLE)
    else:
        # fmt: off
        _move_block(
            p, source, backup, g1, move, index, count, P, W, G, T, GEOMETRY, HAS_BACKUP, WHOLE
        )
        # fmt: on


@triton.jit
def _can_move(scalars, at, target):
    """Without a finite norm there is no way to the points that it scales."""
    by_gradient = (target == POINT.value.ASCENT) | (target == POINT.value.DESCENT)
    by_noise = (target == POINT.value.PROBE) | (at == POINT.value.PROBE)
    from_or_to_w = (target == POINT.value.WEIGHTS) | (at == POINT.value.WEIGHTS)
    finite = is_finite(tl.load(scalars + SLOT.value.METRIC_SQ))
    return (at != target) & (finite | (by_gradient == 0)) & (from_or_to_w | (by_noise == 0))


@triton.jit(do_not_specialize=AT_RUN_TIME)
def _perturb_kernel(
    table,
    first_tensor,
    groups,
    scalars,
    flags,
    tensors,
    chunks,
    chunk_size,
    target,
    P: tl.constexpr,
    W: tl.constexpr,
    G: tl.constexpr,
    T: tl.constexpr,
    GEOMETRY: tl.constexpr,
    HAS_BACKUP: tl.constexpr,
    TO_WEIGHTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """From the point where the parameters are (FLAG.AT) to the point ``target``.

    operand  row      access
    p        kParam   read and written
    g1       kGrad1   read; not for noise. A tensor whose address is 0 is left alone
    backup   kBackup  only with HAS_BACKUP, else w is recomputed; written where w is left, read
                      afterwards. May be g1's own memory where the method does not need g1 any
                      more. Of another dtype than p it is float32 weights: always w, only read.

    Moves 3 elements per parameter, 4 where a backup is written. A norm that is not finite leaves
    the list alone: FLAG.AT says afterwards where it is.
    """
    at = tl.load(flags + FLAG.value.AT).to(tl.int32)
    active = _can_move(scalars, at, target)
    seed = tl.load(scalars + SLOT.value.SEED).to(tl.int64)
    chunk = tl.where(active, tl.program_id(0), chunks)
    while chunk < chunks:
        tensor = tl.load(first_tensor + chunk).to(tl.int32)
        last = last_tensor(first_tensor, chunk, tensors, chunks)
        while tensor <= last:
            begin, count = segment(table, tensors, tensor, chunk, chunk_size)
            p = address(table, ROW.value.PARAM, tensors, tensor, begin, P)
            g1, source, backup = p, p, p
            if GEOMETRY != DIRECTION.value.NOISE:
                g1 = address(table, ROW.value.GRAD1, tensors, tensor, begin, G)
            group = groups + cell(table, ROW.value.GROUP, tensors, tensor) * COLUMNS
            scale_from = tl.zeros((), T)
            if HAS_BACKUP:
                backup = address(table, ROW.value.BACKUP, tensors, tensor, begin, W)
                source = backup
                if W == P:
                    source = tl.where(at == POINT.value.WEIGHTS, p, backup)
            else:
                scale_from = scale_at(at, scalars, group, T)
            moves = (g1 != 0) | (at == POINT.value.PROBE)
            move = Move(
                scale_from,
                scale_at(target, scalars, group, T),
                scaled_eta(scalars, group, GEOMETRY).to(T),
                at == POINT.value.WEIGHTS,
                noise_of_tensor(seed, cell(table, ROW.value.KEY, tensors, tensor)),
                begin,
            )
            count = tl.where(moves, count, 0)
            whole = whole_blocks(p | g1 | source | backup, count, BLOCK)
            # fmt: off
            for i in range(0, whole, BLOCK):
                index = i + tl.arange(0, BLOCK)
                _block(
                    p, source, backup, g1, move, index, count,
                    P, W, G, T, GEOMETRY, HAS_BACKUP, TO_WEIGHTS, True,
                )
            for i in range(whole, count, REST):
                index = i + tl.arange(0, REST)
                _block(
                    p, source, backup, g1, move, index, count,
                    P, W, G, T, GEOMETRY, HAS_BACKUP, TO_WEIGHTS, False,
                )
            # fmt: on
            tensor += 1
        chunk += tl.num_programs(0)
    # Only now does no other program read the flag any more.
    if is_last_program(flags) & active:
        tl.store(flags + FLAG.value.AT, target.to(tl.float64))


def launch(tensors: TensorList, programs: int, target: Point) -> None:
    """Launch on the current stream of the current device, without waiting for anything."""
    table = tensors.table
    assert table is not None
    _perturb_kernel[(programs,)](
        table.table,
        table.chunks,
        tensors.shared.groups,
        tensors.shared.scalars,
        tensors.flags,
        table.table.shape[1],
        table.chunks.shape[0],
        table.chunk_size,
        int(target),
        **operands(
            tensors.key.dtype,
            tensors.grad_dtype,
            tensors.key.geometry,
            table.chunk_size,
            has_backup=tensors.backups is not None,
            has_master=tensors.key.has_master,
            target=target,
        ),
        **options(PROGRAMS_PER_PROCESSOR),
    )


def operands(
    dtype: torch.dtype,
    grad_dtype: torch.dtype,
    geometry: Geometry,
    chunk_size: int,
    *,
    has_backup: bool,
    has_master: bool,
    target: Point,
) -> dict[str, Any]:
    """What the kernel is compiled for."""
    to_weights = target == Point.WEIGHTS
    direction = DIRECTION.value.NOISE if target == Point.PROBE else int(geometry)
    kept = torch.float32 if has_master else dtype
    return {
        "P": TRITON_DTYPES[dtype],
        "W": TRITON_DTYPES[kept],
        "G": TRITON_DTYPES[dtype if target == Point.PROBE else grad_dtype],
        "T": TRITON_DTYPES[compute_dtype(dtype)],
        # The way back knows no metric.
        "GEOMETRY": int(Geometry.EUCLIDEAN) if to_weights else direction,
        "HAS_BACKUP": has_backup,
        "TO_WEIGHTS": to_weights,
        "BLOCK": block_size(kept, chunk_size),
    }
