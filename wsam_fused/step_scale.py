"""What the gradients of a step are multiplied by, where the kernels read it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from wsam_fused.plan import INVERSE_SCALES, Slot
from wsam_fused.tensor_lists import TensorLists


class StepScale:
    """The loss scale of the step in progress, on all devices.

    Args:
        lists: The parameters.

    Attributes:
        is_set: Whether there is one.
    """

    def __init__(self, lists: TensorLists) -> None:
        self._lists = lists
        self.is_set = True  # tables that come from elsewhere may have one

    def set(self, scale: Tensor | None) -> None:
        """Say what the gradients are multiplied by; None for nothing."""
        if scale is None and not self.is_set:
            return
        for shared in self._lists.shared.values():
            shared.set_loss_scale(scale)
        self.is_set = scale is not None

    def forget(self, evaluation: int) -> None:
        """Say that the gradients of one evaluation are not multiplied by it any more."""
        for shared in self._lists.shared.values():
            shared.scalars[Slot.INV_SCALE1 + evaluation] = 1.0

    def set_found_inf(self, found: Tensor) -> None:
        """Say whether somebody else saw a gradient that is not finite: a scalar, not 0 if so."""
        for shared in self._lists.shared.values():
            shared.scalars[Slot.FOUND_INF].copy_(found, non_blocking=True)

    @contextmanager
    def taken_out(self) -> Iterator[None]:
        """Take what is in the memory of the gradients as it is: h and d, which are unscaled."""
        shared = self._lists.shared.values() if self.is_set else []
        inverse = [one.scalars[INVERSE_SCALES] for one in shared]
        saved = [one.clone() for one in inverse]
        for one in inverse:
            one.fill_(1.0)
        yield
        for one, before in zip(inverse, saved, strict=True):
            one.copy_(before)
