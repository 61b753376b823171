"""Brings the addresses of a tensor list into its table, for all backends that walk memory."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from wsam_fused.plan import PointerTable, TableRow, addresses_of
from wsam_fused.tensor_list import TensorList

GRADIENT_ROWS = (TableRow.GRAD1, TableRow.GRAD2, TableRow.GRAD3)
_STATE_ROWS = (TableRow.STATE1, TableRow.STATE2, TableRow.STATE3)


def bind(
    tensors: TensorList, evaluation: int, addresses: Tensor, chunk_size: Callable[[int], int]
) -> None:
    """Take over the addresses of the gradients of one evaluation, 0 for g1.

    Args:
        tensors: The list; its table is made when it has none.
        evaluation: Which gradients.
        addresses: int64 ``[n]`` on the host, 0 where there is none.
        chunk_size: Gives the elements per chunk for a number of elements.
    """
    if tensors.table is None:
        sizes = list(map(Tensor.numel, tensors.params))
        size = chunk_size(sum(sizes))
        table = PointerTable(sizes, tensors.groups, tensors.keys, size, tensors.key.device)
        table.set_tensors(TableRow.PARAM, tensors.params)
        for row, states in zip(_STATE_ROWS, tensors.states, strict=False):
            table.set_tensors(row, states)
        if tensors.backups is not None:  # weights in float32, which stay where they are
            table.set_row(TableRow.BACKUP, tensors.backups.addresses)
        tensors.table = table  # not before it is whole: it may be interrupted
    tensors.table.set_row(GRADIENT_ROWS[evaluation], addresses)


def bind_backups(tensors: TensorList) -> None:
    """Take over the addresses of the copies of w."""
    if tensors.backups is not None:
        table_of(tensors).set_row(TableRow.BACKUP, tensors.backups.addresses)


def refresh(tensors: TensorList) -> None:
    """Take over the addresses of the parameters and of what a restore reads again."""
    table = table_of(tensors)
    table.set_tensors(TableRow.PARAM, tensors.params)
    if tensors.grads[0]:
        table.set_row(TableRow.GRAD1, addresses_of(tensors.grads[0]))
    bind_backups(tensors)


def table_of(tensors: TensorList) -> PointerTable:
    """Return the table, which exists from the first :func:`bind` on."""
    assert tensors.table is not None
    return tensors.table
