"""Scratch that stays for the next step, where getting it anew would cost more than using it."""

from __future__ import annotations

import torch
from torch import Tensor


def keeps_scratch(device: torch.device) -> bool:
    """Whether scratch of the parameters' size is kept between steps.

    On a CPU freed memory of that size goes back to the system, and the first touch of every page of
    the next one takes longer than the kernel that writes it. On a GPU torch's allocator keeps it,
    and others may use it meanwhile.
    """
    return device.type == "cpu"


class KeptSums:
    """Memory for the sums of gradients of a step, by parameter."""

    def __init__(self) -> None:
        self._kept: dict[Tensor, Tensor] = {}

    def begin(self, param: Tensor, grad: Tensor, share: float) -> Tensor:
        """Return ``share * grad`` in the parameter's dtype.

        Where possible it is in the memory that the last step had for it.
        """
        grad = grad.to(param.dtype)
        kept = self._kept.get(param)
        if kept is not None and _alike(kept, grad):
            return torch.mul(grad, share, out=kept)
        scaled = grad * share
        if keeps_scratch(grad.device):
            self._kept[param] = scaled
        return scaled


def _alike(left: Tensor, right: Tensor) -> bool:
    return (left.device, left.dtype, left.shape, left.stride()) == (
        right.device,
        right.dtype,
        right.shape,
        right.stride(),
    )
