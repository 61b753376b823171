"""The compiled kernels: passes the addresses of a tensor list to the extension. No arithmetic.

Supported: float32 and float64 parameters on the CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from wsam_fused import _extension
from wsam_fused.base_rules import BaseRule
from wsam_fused.plan import PointerTable, TableRow
from wsam_fused.tensor_list import Settings, TensorList

DEVICE_TYPES: tuple[str, ...] = ("cpu",)
DTYPES: tuple[torch.dtype, ...] = (torch.float32, torch.float64)
# Elements per chunk: five streams of a chunk stay inside a second-level cache, and a thread's
# share of a list is balanced to one of them.
CHUNK_SIZE = 16384

_GRADIENT_ROWS = (TableRow.GRAD1, TableRow.GRAD2, TableRow.GRAD3)
_STATE_ROWS = (TableRow.STATE1, TableRow.STATE2, TableRow.STATE3)


def unavailable() -> str | None:
    """Why this backend cannot be used here, or None."""
    return _extension.UNAVAILABLE


def bind(tensors: TensorList, evaluation: int, addresses: Tensor) -> None:
    """Take over the addresses of the gradients of one evaluation, 0 for g1."""
    table = _table_of(tensors)
    if evaluation == 0:
        for row in (*_GRADIENT_ROWS[1:], TableRow.BACKUP):
            table.clear_row(row)
    table.set_row(_GRADIENT_ROWS[evaluation], addresses)


def reduce(tensors: TensorList, evaluation: int) -> None:
    """Add the sums of squares of one gradient list to the shared scalars."""
    table = _table_of(tensors)
    torch.ops.wsam_fused.reduce.default(
        table.table,
        table.chunks,
        table.chunk_size,
        tensors.key.dtype,
        _GRADIENT_ROWS[evaluation],
        tensors.key.geometry,
        table.partials,
        tensors.shared.scalars,
    )


def perturb(tensors: TensorList, settings: Settings, *, undo: bool = False) -> None:
    """Move the parameters to the ascent point, or with ``undo`` back to w."""
    table = _table_of(tensors)
    if tensors.backups and not undo:
        table.set_tensors(TableRow.BACKUP, tensors.backups)
    torch.ops.wsam_fused.perturb_.default(
        table.table,
        table.chunks,
        table.chunk_size,
        tensors.key.dtype,
        tensors.shared.groups,
        tensors.shared.scalars,
        tensors.flags,
        tensors.key.geometry,
        bool(tensors.backups),
        undo,
        settings.eps,
    )
    if undo:  # the reader of the gradients has told autograd of the rest
        increment_version(tensors.params)


def update(
    tensors: TensorList,
    settings: Settings,
    rule: BaseRule,
    evaluations: int,
    *,
    count_skipped: bool,
) -> None:
    """Restore w, step the base rule and subtract the decoupled term."""
    table = _table_of(tensors)
    torch.ops.wsam_fused.update_.default(
        table.table,
        table.chunks,
        table.chunk_size,
        tensors.key.dtype,
        tensors.shared.groups,
        tensors.shared.scalars,
        tensors.flags,
        tensors.steps,
        rule,
        evaluations,
        bool(tensors.backups),
        settings.check_second,
        count_skipped,
        settings.eps,
        settings.max_norm,
    )


def refresh(tensors: TensorList) -> None:
    """Take over the addresses of the parameters and of what a restore reads again."""
    table = _table_of(tensors)
    table.set_tensors(TableRow.PARAM, tensors.params)
    pointers = [0 if grad is None else grad.data_ptr() for grad in tensors.grads[0]]
    table.set_row(TableRow.GRAD1, torch.tensor(pointers))
    if tensors.backups:
        table.set_tensors(TableRow.BACKUP, tensors.backups)


def _table_of(tensors: TensorList) -> PointerTable:
    if tensors.table is None:
        sizes = list(map(Tensor.numel, tensors.params))
        tensors.table = table = PointerTable(sizes, tensors.groups, CHUNK_SIZE)
        table.set_tensors(TableRow.PARAM, tensors.params)
        for row, states in zip(_STATE_ROWS, tensors.states, strict=False):
            table.set_tensors(row, states)
    return tensors.table
