"""The best that can be written with torch's multi-tensor operations and its fused optimizers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.contenders.contender import EPS, RHO, WEIGHT, Base, Contender


class Foreach(Contender):
    """No copy, no stored perturbation: what is left is one pass per operation.

    The scale is a Python number, which saves two passes (``alpha=``) and is free on a CPU; on a
    GPU it would wait for the device.
    """

    name = "foreach"

    def __init__(self, params: Sequence[Tensor], base: Base) -> None:
        super().__init__(params, base)
        self.optimizer = base.make(params, fused=True)
        self.g1: list[Tensor] = []
        self.scale = 0.0

    @classmethod
    def moved(cls, base: Base) -> int:
        """Elements read and written per parameter and step."""
        # norm 1, p.add_ 3, p.sub_ 3, g2.sub_ 3, the base, p.add_ 3.
        return 13 + base.fused_moved

    @torch.no_grad()
    def first(self) -> None:
        """Go to the ascent point and take g1."""
        self.g1 = self.take_gradients()
        self._perturb()

    @torch.no_grad()
    def second(self) -> None:
        """Come back, step the base with g1 and subtract g2 - g1, formed in g2's memory."""
        assert self.optimizer is not None
        self._restore()
        sharpness = self.take_gradients()
        torch._foreach_sub_(sharpness, self.g1)
        for param, grad in zip(self.params, self.g1, strict=True):
            param.grad = grad
        self.optimizer.step()
        lr = self.optimizer.param_groups[0]["lr"]
        torch._foreach_add_(self.params, sharpness, alpha=-lr * WEIGHT)
        self.g1 = []

    def _perturb(self) -> None:
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(self.g1)))
        self.scale = RHO / (norm.item() + EPS)
        torch._foreach_add_(self.params, self.g1, alpha=self.scale)

    def _restore(self) -> None:
        torch._foreach_add_(self.params, self.g1, alpha=-self.scale)


class ForeachNoSync(Foreach):
    """The same for a GPU: the scale stays on the device and nothing waits for it.

    A multi-tensor operation takes a tensor as factor of a list only in a pass of its own, with a
    list of its own. torch's fused SGD without momentum takes its learning rate as a tensor and
    computes p -+ lr g in one pass, which is what is needed here.
    """

    def __init__(self, params: Sequence[Tensor], base: Base) -> None:
        super().__init__(params, base)
        self.device_scale = torch.zeros((), device=self.params[0].device)

    def _perturb(self) -> None:
        norms = torch._foreach_norm(self.g1, 2, dtype=torch.float32)
        self.device_scale = RHO / (torch.linalg.vector_norm(torch.stack(norms)) + EPS)
        self._shift(upwards=True)

    def _restore(self) -> None:
        self._shift(upwards=False)

    def _shift(self, *, upwards: bool) -> None:
        torch._fused_sgd_(
            self.params,
            self.g1,
            [],
            weight_decay=0.0,
            momentum=0.0,
            lr=self.device_scale,
            dampening=0.0,
            nesterov=False,
            maximize=upwards,
            is_first_step=False,
        )
