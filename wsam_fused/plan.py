"""Pointer and chunk tables: how the native kernels see a list of tensors.

This file mirrors ``csrc/plan.h``, order included. The extension reports the sizes of its tables;
:mod:`wsam_fused._extension` refuses one with others.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor


class TableRow(IntEnum):
    """Rows of the table; an address of 0 means that the tensor has none in this step."""

    PARAM = 0
    GRAD1 = 1
    GRAD2 = 2
    GRAD3 = 3
    BACKUP = 4
    STATE1 = 5
    STATE2 = 6
    STATE3 = 7
    OFFSET = 8
    SIZE = 9
    GROUP = 10


class GroupRow(NamedTuple):
    """What a parameter group contributes to a step; the order is that of ``csrc/plan.h``."""

    rho: float
    sign: float
    h1: float
    h2: float
    h3: float
    d1: float
    d2: float
    d3: float
    lr: float
    l2: float
    decay: float
    beta1: float
    beta2: float
    eps: float
    nesterov: float

    @property
    def h(self) -> tuple[float, float, float]:
        """Weights of g1, g2, g3 in what the base rule is fed."""
        return self.h1, self.h2, self.h3

    @property
    def d(self) -> tuple[float, float, float]:
        """Weights of g1, g2, g3 in the decoupled term."""
        return self.d1, self.d2, self.d3


class Slot(IntEnum):
    """Slots of the float64 scalars that all lists of a device share."""

    METRIC_SQ = 0
    GRAD1_SQ = 1
    GRAD2_SQ = 2
    SKIPPED = 3


class Geometry(IntEnum):
    """The metric of the perturbation."""

    EUCLIDEAN = 0
    ADAPTIVE = 1


ALIGNMENT = 64
FLAGS = 1
LAYOUT = [len(TableRow), len(GroupRow._fields), len(Slot), FLAGS, ALIGNMENT]


class PointerTable:
    """The table of one tensor list, with its chunks.

    Every tensor begins at a multiple of ``ALIGNMENT`` in a virtual index space that is cut into
    chunks of one size: large tensors are split, small ones packed.

    Attributes:
        table: int64 ``[rows, n]``, see :class:`TableRow`.
        chunks: int64 ``[chunks]``, the first tensor that reaches into each chunk.
        chunk_size: Elements per chunk.
        partials: float64 ``[2 * chunks]``, scratch of the reductions.
    """

    def __init__(self, sizes: Sequence[int], groups: Sequence[int], chunk_size: int) -> None:
        offsets = [0]
        for size in sizes:
            offsets.append(offsets[-1] + -(-size // ALIGNMENT) * ALIGNMENT)
        total = offsets.pop()
        starts = range(0, total, chunk_size)
        first_tensor, tensor = [], 0
        for start in starts:
            while tensor + 1 < len(offsets) and offsets[tensor + 1] <= start:
                tensor += 1
            first_tensor.append(tensor)
        self.chunk_size = chunk_size
        self.table = torch.zeros(len(TableRow), len(sizes), dtype=torch.int64)
        self.chunks = torch.tensor(first_tensor, dtype=torch.int64)
        self.partials = torch.zeros(2 * len(first_tensor), dtype=torch.float64)
        self._rows = list(self.table.unbind())
        self.set_row(TableRow.OFFSET, torch.tensor(offsets))
        self.set_row(TableRow.SIZE, torch.tensor(sizes))
        self.set_row(TableRow.GROUP, torch.tensor(groups))

    def set_row(self, row: TableRow, values: Tensor) -> None:
        """Write one row; ``values`` is int64 ``[n]``."""
        self._rows[row].copy_(values)

    def set_tensors(self, row: TableRow, tensors: Sequence[Tensor]) -> None:
        """Write the addresses of ``tensors`` into one row."""
        self.set_row(row, torch.tensor(list(map(Tensor.data_ptr, tensors))))

    def clear_row(self, row: TableRow) -> None:
        """Say that no tensor has this operand."""
        self._rows[row].zero_()
