"""Sums over parameters whose parts lie on several ranks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from wsam_fused.distributed import Sharding, is_dtensor, sharded_dimensions, sharding_of


class SumsOverRanks:
    """Adds up what the ranks have of each parameter; what they all have counts once.

    The partial sums of all kinds of sharding travel together: there is one collective for each mesh
    dimension that splits any parameter. Which, and in which order, follows from the parameters
    alone, so that all ranks agree, whatever they have of them.

    Args:
        params: All parameters of an optimizer, DTensors.

    Attributes:
        shardings: The kinds of sharding that there are.
    """

    def __init__(self, params: Sequence[Any]) -> None:
        self.shardings: list[Sharding] = []
        self._groups: dict[str, Any] = {}
        self._device_type: str = params[0].device_mesh.device_type
        for param in params:
            sharding = sharding_of(param)
            if sharding is not None and sharding not in self.shardings:
                self.shardings.append(sharding)
                groups = [param.device_mesh.get_group(i) for i in sharded_dimensions(param)]
                self._groups.update(zip(sharding.groups, groups, strict=True))

    @classmethod
    def of(cls, params: Iterable[Tensor]) -> SumsOverRanks | None:
        """Return the sums for an optimizer's parameters, None if they are plain tensors."""
        distributed = [param for param in params if is_dtensor(param)]
        return cls(distributed) if distributed else None

    @torch.no_grad()
    def total(self, parts: Sequence[Tensor]) -> Tensor:
        """Return the sums over all ranks and shardings. Nothing waits for the device.

        Args:
            parts: This rank's sums, float64 ``[k]``, one for each of ``shardings``.

        Returns:
            float64 ``[k]``, on the device of ``parts``.
        """
        parts = list(parts)
        for name, group in self._groups.items():
            members = [i for i, one in enumerate(self.shardings) if name in one.groups]
            together = torch.stack([parts[i] for i in members])
            for i, part in zip(members, self._all_reduced(together, group), strict=True):
                parts[i] = part
        return torch.stack(parts).sum(0)

    def _all_reduced(self, values: Tensor, group: Any) -> Tensor:
        device = values.device
        if device.type != self._device_type:  # offloaded parameters: the ranks talk on the mesh's
            values = values.to(self._device_type)
        torch.distributed.all_reduce(values, group=group)
        return values.to(device)
