# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""perturb: to the ascent point, and back."""

from __future__ import annotations

from typing import Any

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]

from wsam_fused.backends.triton.constants import (
    AT_RUN_TIME,
    COLUMNS,
    FLAG,
    REST,
    ROW,
    SLOT,
    TRITON_DTYPES,
    block_size,
    compute_dtype,
    options,
)
from wsam_fused.backends.triton.math import (
    ascent_scale,
    is_finite,
    perturbed,
    recomputed,
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
from wsam_fused.plan import Geometry
from wsam_fused.tensor_list import TensorList

PROGRAMS_PER_PROCESSOR = 6


@triton.jit
def restore_block(
    p,
    source,
    g1,
    scale,
    index,
    count,
    P: tl.constexpr,
    G: tl.constexpr,
    T: tl.constexpr,
    HAS_BACKUP: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Put w back: w = fma(-s, g1, p), or the backup, which is the source then."""
    w = load(source, index, count, P, T, WHOLE)
    if not HAS_BACKUP:
        w = recomputed(w, load(g1, index, count, G, T, WHOLE), scale)
    store(p, index, count, w, P, WHOLE)


@triton.jit
def _perturb_block(
    p,
    backup,
    g1,
    scale,
    index,
    count,
    P: tl.constexpr,
    G: tl.constexpr,
    T: tl.constexpr,
    GEOMETRY: tl.constexpr,
    HAS_BACKUP: tl.constexpr,
    WHOLE: tl.constexpr,
):
    w = load(p, index, count, P, T, WHOLE)
    g = load(g1, index, count, G, T, WHOLE)
    if HAS_BACKUP:  # may be the memory of g1, which has been read
        store(backup, index, count, w, P, WHOLE)
    store(p, index, count, perturbed(w, g, scale, GEOMETRY), P, WHOLE)


@triton.jit
def _move_block(
    p,
    backup,
    g1,
    scale,
    index,
    count,
    P: tl.constexpr,
    G: tl.constexpr,
    T: tl.constexpr,
    GEOMETRY: tl.constexpr,
    HAS_BACKUP: tl.constexpr,
    UNDO: tl.constexpr,
    WHOLE: tl.constexpr,
):
    if UNDO:
        source = p
        if HAS_BACKUP:
            source = backup
        restore_block(p, source, g1, scale, index, count, P, G, T, HAS_BACKUP, WHOLE)
    else:
        _perturb_block(p, backup, g1, scale, index, count, P, G, T, GEOMETRY, HAS_BACKUP, WHOLE)


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
    P: tl.constexpr,
    G: tl.constexpr,
    T: tl.constexpr,
    GEOMETRY: tl.constexpr,
    HAS_BACKUP: tl.constexpr,
    UNDO: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """P <- fma(s, M(w) g1, w) with s = sign * rho / (norm + eps), or with UNDO the way back.

    operand  row      access
    p        kParam   read and written
    g1       kGrad1   read           a tensor whose address is 0 is left alone
    backup   kBackup  written, read by UNDO; only with HAS_BACKUP, else w is recomputed. May be
                      g1's own memory where the method does not need g1 any more.

    Moves 3 elements per parameter, 4 with a backup. A norm that is not finite leaves the list
    alone. flags[kPerturbed] says afterwards what is in p; UNDO does nothing where it is 0.
    """
    metric_sq = tl.load(scalars + SLOT.value.METRIC_SQ)
    active = is_finite(metric_sq) & ((tl.load(flags + FLAG.value.PERTURBED) != 0) == UNDO)
    chunk = tl.where(active, tl.program_id(0), chunks)
    while chunk < chunks:
        tensor = tl.load(first_tensor + chunk).to(tl.int32)
        last = last_tensor(first_tensor, chunk, tensors, chunks)
        while tensor <= last:
            begin, count = segment(table, tensors, tensor, chunk, chunk_size)
            p = address(table, ROW.value.PARAM, tensors, tensor, begin, P)
            g1 = address(table, ROW.value.GRAD1, tensors, tensor, begin, G)
            backup = p
            if HAS_BACKUP:
                backup = address(table, ROW.value.BACKUP, tensors, tensor, begin, P)
            group = groups + cell(table, ROW.value.GROUP, tensors, tensor) * COLUMNS
            scale = ascent_scale(metric_sq, group, T)
            count = tl.where(g1 == 0, 0, count)
            whole = whole_blocks(p | g1 | backup, count, BLOCK)
            for i in range(0, whole, BLOCK):
                index = i + tl.arange(0, BLOCK)
                _move_block(
                    p, backup, g1, scale, index, count, P, G, T, GEOMETRY, HAS_BACKUP, UNDO, True
                )
            for i in range(whole, count, REST):
                index = i + tl.arange(0, REST)
                _move_block(
                    p, backup, g1, scale, index, count, P, G, T, GEOMETRY, HAS_BACKUP, UNDO, False
                )
            tensor += 1
        chunk += tl.num_programs(0)
    # Only now does no other program read the flag any more.
    if is_last_program(flags) & active:
        tl.store(flags + FLAG.value.PERTURBED, 0.0 if UNDO else 1.0)


def launch(tensors: TensorList, programs: int, *, undo: bool) -> None:
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
        **operands(
            tensors.key.dtype,
            tensors.grad_dtype,
            tensors.key.geometry,
            table.chunk_size,
            has_backup=tensors.backups is not None,
            undo=undo,
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
    undo: bool,
) -> dict[str, Any]:
    """What the kernel is compiled for."""
    return {
        "P": TRITON_DTYPES[dtype],
        "G": TRITON_DTYPES[grad_dtype],
        "T": TRITON_DTYPES[compute_dtype(dtype)],
        # The way back reads no metric.
        "GEOMETRY": int(Geometry.EUCLIDEAN if undo else geometry),
        "HAS_BACKUP": has_backup,
        "UNDO": undo,
        "BLOCK": block_size(dtype, chunk_size),
    }
