"""Implementations that are used as they are: this library, torch's own, and pytorch-optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, ClassVar

import torch
from torch import Tensor

from benchmarks.contenders.contender import GAMMA, RHO, Base, Contender
from wsam_fused import WSAM


class TwoCalls(Contender):
    """An optimizer with the two calls of the field, which a subclass puts into ``wsam``."""

    wsam: Any

    def first(self) -> None:
        """Go to the ascent point and take the gradients out of ``.grad``."""
        self.wsam.first_step(zero_grad=True)

    def second(self) -> None:
        """Come back and update."""
        self.wsam.second_step()

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint would hold."""
        return self.wsam.state_dict()


class Ours(TwoCalls):
    """wsam_fused with its default settings."""

    name = "wsam_fused"

    def __init__(self, params: Sequence[Tensor], base: Base) -> None:
        super().__init__(params, base)
        self.wsam = WSAM(params, base.optimizer, rho=RHO, gamma=GAMMA, **base.options)

    @classmethod
    def moved(cls, base: Base) -> int:
        """Elements read and written per parameter and step."""
        # reduce 1, perturb 3; update is the fused base's pass and g2 (w is recomputed from g1).
        return 5 + base.fused_moved


class Plain(Contender):
    """The floor: torch's fused base optimizer without any sharpness term, one gradient."""

    name = "plain"
    gradients = 1

    def __init__(self, params: Sequence[Tensor], base: Base) -> None:
        super().__init__(params, base)
        self.optimizer = base.make(params, fused=True)

    @classmethod
    def moved(cls, base: Base) -> int:
        """Elements read and written per parameter and step."""
        return base.fused_moved

    def first(self) -> None:
        """Step."""
        assert self.optimizer is not None
        self.optimizer.step()

    def second(self) -> None:
        """Nothing is left to do."""


class PytorchOptimizer(TwoCalls):
    """WSAM of the package pytorch-optimizer, default settings."""

    name = "pytorch-optimizer"
    how: ClassVar[dict[str, bool]] = {}

    def __init__(self, params: Sequence[Tensor], base: Base) -> None:
        super().__init__(params, base)
        import pytorch_optimizer

        # It uses the model for clipping and in closures only.
        self.wsam = pytorch_optimizer.WSAM(
            torch.nn.Module(),
            params,
            base.optimizer,
            rho=RHO,
            gamma=GAMMA,
            **base.options,
            **self.how,
        )
        self.optimizer = self.wsam.base_optimizer

    @classmethod
    def unavailable(cls) -> str | None:
        """Why it cannot run here, or None."""
        return None if find_spec("pytorch_optimizer") else "not installed"

    @classmethod
    def moved(cls, base: Base) -> int:
        """Elements read and written per parameter and step."""
        # norm 1, 1 * g 2, times scale 2, p.add_ 3, clone 2; p.sub_ 3, clone 2, minus g1 3,
        # grad.copy_ 2, the base, p.add_ 3.
        return 23 + base.loop_moved


class PytorchOptimizerForeach(PytorchOptimizer):
    """WSAM of the package pytorch-optimizer with ``foreach=True``."""

    name = "pytorch-optimizer-foreach"
    how: ClassVar[dict[str, bool]] = {"foreach": True}

    @classmethod
    def moved(cls, base: Base) -> int:
        """Elements read and written per parameter and step."""
        # As above without the clone of g2.
        return 21 + base.loop_moved
