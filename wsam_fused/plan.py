"""Pointer and chunk tables: how the native kernels see a list of tensors.

This file mirrors ``csrc/plan.h``, order included. The extension reports the sizes of its tables;
:mod:`wsam_fused._extension` refuses one with others.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import IntEnum
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from wsam_fused.upload import Upload


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
    KEY = 11


class GroupRow(NamedTuple):
    """What a parameter group contributes to a step; the order is that of ``csrc/plan.h``."""

    rho: float
    rho_descent: float
    delta: float
    eta: float
    ascent_eps: float
    max_norm: float
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
    GRAD3_SQ = 3
    DOT12 = 4
    SKIPPED = 5
    SEED = 6
    INV_SCALE1 = 7
    INV_SCALE2 = 8
    INV_SCALE3 = 9
    FOUND_INF = 10


INVERSE_SCALES = slice(Slot.INV_SCALE1, Slot.INV_SCALE3 + 1)


class Geometry(IntEnum):
    """The metric M of the perturbation e = rho M g1 / sqrt(sum of M g1^2)."""

    EUCLIDEAN = 0  # 1
    ADAPTIVE = 1  # (|w| + eta)^2
    FISHER = 2  # 1 / (1 + eta g1^2)


class Point(IntEnum):
    """Where the parameters are."""

    WEIGHTS = 0  # w
    ASCENT = 1  # w + e
    DESCENT = 2  # w - e of the radius rho_descent
    PROBE = 3  # w + delta z, z noise of -1 and 1


ALIGNMENT = 64
FLAGS = 2  # the point where the list is, and a counter of the GPU kernels
LAYOUT = [len(TableRow), len(GroupRow._fields), len(Slot), FLAGS, ALIGNMENT]


def host_integers(values: Iterable[int]) -> Tensor:
    """Return an int64 tensor on the host, whatever the default device is."""
    return torch.tensor(list(values), dtype=torch.int64, device="cpu")


def addresses_of(tensors: Iterable[Tensor | None]) -> Tensor:
    """Return int64 ``[n]`` on the host, 0 where there is no tensor."""
    return host_integers(0 if tensor is None else tensor.data_ptr() for tensor in tensors)


class PointerTable:
    """The table of one tensor list, with its chunks.

    Every tensor begins at a multiple of ``ALIGNMENT`` in a virtual index space that is cut into
    chunks of one size: large tensors are split, small ones packed.

    Args:
        sizes: Elements of each tensor.
        groups: Parameter group of each tensor.
        keys: Which parameter of the optimizer each tensor is.
        chunk_size: Elements per chunk, a multiple of ``ALIGNMENT``.
        device: Where the kernels run; all tensors of the table are there.

    Attributes:
        table: int64 ``[rows, n]``, see :class:`TableRow`.
        chunks: int64 ``[chunks]``, the first tensor that reaches into each chunk.
        chunk_size: Elements per chunk.
        partials: float64 ``[2 * chunks]``, scratch of the reductions.
        offsets: int64 ``[n]`` on the host, where each tensor begins in the virtual index space.
        total: Size of that space.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        groups: Sequence[int],
        keys: Sequence[int],
        chunk_size: int,
        device: torch.device,
    ) -> None:
        ends = list(accumulate(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes))
        offsets, self.total = [0, *ends[:-1]], ends[-1]
        first_tensor, tensor = [], 0
        for start in range(0, self.total, chunk_size):
            while ends[tensor] <= start:
                tensor += 1
            first_tensor.append(tensor)
        self.chunk_size = chunk_size
        self.offsets = host_integers(offsets)
        table = torch.zeros(len(TableRow), len(sizes), dtype=torch.int64, device="cpu")
        table[TableRow.OFFSET] = self.offsets
        table[TableRow.SIZE] = host_integers(sizes)
        table[TableRow.GROUP] = host_integers(groups)
        table[TableRow.KEY] = host_integers(keys)
        self.table = table.to(device)
        self.chunks = host_integers(first_tensor).to(device)
        self.partials = torch.zeros(2 * len(first_tensor), dtype=torch.float64, device=device)
        self._rows = [Upload(row) for row in self.table.unbind()]

    def set_row(self, row: TableRow, values: Tensor) -> None:
        """Write one row; ``values`` is int64 ``[n]`` on the host. Nothing waits for the device."""
        self._rows[row].send(values)

    def set_tensors(self, row: TableRow, tensors: Sequence[Tensor]) -> None:
        """Write the addresses of ``tensors`` into one row."""
        self.set_row(row, addresses_of(tensors))

    def is_captured(self) -> bool:
        """Whether a CUDA graph writes this table at its replays."""
        return any(row.is_captured() for row in self._rows)
