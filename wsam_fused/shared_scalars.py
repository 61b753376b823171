"""What all lists of one device have in common: sums, counters and the group table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from wsam_fused.plan import INVERSE_SCALES, GroupRow, Slot
from wsam_fused.upload import Upload

_COLUMN = {name: index for index, name in enumerate(GroupRow._fields)}
_LR = _COLUMN["lr"]


class SharedScalars:
    """The scalars and the group table of one device.

    Attributes:
        scalars: float64, see :class:`~wsam_fused.plan.Slot`.
        rows: One row per parameter group, on the host; NaN where only the device knows a value.
        groups: The same as a float64 tensor on the device.
    """

    def __init__(self, device: torch.device) -> None:
        self.scalars = torch.zeros(len(Slot), dtype=torch.float64, device=device)
        self.scalars[INVERSE_SCALES] = 1.0
        self.rows: list[GroupRow] = []
        self.groups = torch.zeros(0, len(GroupRow._fields), dtype=torch.float64, device=device)
        self._upload = Upload(self.groups)

    def set_rows(self, rows: list[GroupRow]) -> None:
        """Bring the group table up to date.

        Nothing moves if nothing changed, unless a CUDA graph is involved: its replays bring the
        values of the capture again, which the host does not notice.
        """
        if rows == self.rows and not self._upload.is_replayed():
            return
        if len(rows) != len(self.rows):
            self.groups = self.groups.new_zeros(len(rows), len(GroupRow._fields))
            self._upload = Upload(self.groups)
        self._upload.send(torch.tensor(rows, dtype=torch.float64, device="cpu"))
        self.rows = list(rows)

    def set_loss_scale(self, scale: Tensor | None) -> None:
        """Say what the gradients of a step are multiplied by; None for nothing."""
        inverse = self.scalars[INVERSE_SCALES]
        self.scalars[Slot.FOUND_INF].zero_()
        if scale is None:
            inverse.fill_(1.0)
        else:
            inverse.copy_(scale.double().reciprocal(), non_blocking=True)

    def set_learning_rates(self, rates: list[Tensor | None]) -> None:
        """Copy learning rates that live on a device into the table, for groups that have one."""
        for index, rate in enumerate(rates):
            if rate is not None:
                self.groups[index, _LR].copy_(rate.reshape(()), non_blocking=True)

    def set_derived(self, derived: Sequence[Mapping[str, Tensor]]) -> None:
        """Copy values that live on a device into the table, one mapping by column per group."""
        for index, columns in enumerate(derived):
            for name, value in columns.items():
                self.groups[index, _COLUMN[name]].copy_(value, non_blocking=True)

    def is_captured(self) -> bool:
        """Whether a CUDA graph writes the group table at its replays."""
        return self._upload.is_captured()

    def value(self, group: int, column: str) -> float | Tensor:
        """Return an entry of the table: a scalar on the device if the host does not know it."""
        found: float = getattr(self.rows[group], column)
        return self.groups[group, _COLUMN[column]] if math.isnan(found) else found
