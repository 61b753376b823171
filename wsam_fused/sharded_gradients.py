"""Reads the gradients of DTensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from wsam_fused.distributed import distributed_like, is_dtensor, like, local_of
from wsam_fused.gradients import GradientReader, Gradients


class ShardedGradientReader(GradientReader):
    """Reads a rank's own part of every gradient.

    A gradient with other placements than its parameter is redistributed. FSDP2 may exchange the
    local memory of a parameter; that is noticed as with plain parameters.

    Args:
        owners: The parameters, DTensors.
        params: Their local tensors; the list is kept up to date.
        dtypes: What gradients may have besides the parameters' own dtype.
    """

    def __init__(
        self, owners: Sequence[Tensor], params: list[Tensor], dtypes: Sequence[torch.dtype] = ()
    ) -> None:
        super().__init__(params, dtypes)
        self._owners = list(owners)
        self._params = params

    def moved(self) -> bool:
        """Whether a parameter has other storage, shape or strides than before."""
        self._follow_owners()
        return super().moved()

    def read(self, *, take: bool = False, copy: bool = False, writes: bool = False) -> Gradients:
        """Read the gradients; see :meth:`GradientReader.read`."""
        self._follow_owners()
        increment_version(self._owners)
        return super().read(take=take, copy=copy, writes=writes)

    def give_back(self, tensors: Sequence[Tensor | None]) -> None:
        """Put gradients that were taken out of ``.grad`` back."""
        for owner, grad in zip(self._owners, tensors, strict=False):
            if owner.grad is None:
                owner.grad = like(owner, grad)

    def _follow_owners(self) -> None:
        for i, owner in enumerate(self._owners):
            local = local_of(owner)
            if local is not self._params[i]:
                self._params[i] = local

    def _read_usual(self, *, take: bool) -> list[Tensor | None] | None:
        return None

    def _found(self) -> list[Tensor | None]:
        return [local_gradient(owner) for owner in self._owners]

    def _take(self) -> None:
        for owner in self._owners:
            owner.grad = None


def local_gradient(owner: Tensor) -> Tensor | None:
    """Return a rank's own part of the gradient of a parameter, placed as the parameter is.

    Raises:
        TypeError: It is a plain tensor, and the parameter is a DTensor.
    """
    grad = owner.grad
    if grad is None or not is_dtensor(owner):
        return grad
    if not is_dtensor(grad):
        raise TypeError(
            f"the gradient of a DTensor of shape {tuple(owner.shape)} is a plain tensor, expected "
            "a DTensor"
        )
    return distributed_like(owner, grad)
