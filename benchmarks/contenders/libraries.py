"""Implementations that are used as they are: this library, torch's own, and pytorch-optimizer."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from importlib.util import find_spec
from typing import Any, ClassVar

import torch
from torch import Tensor

from benchmarks.contenders.contender import GAMMA, RHO, Base, Contender, Passes
from wsam_fused import WSAM
from wsam_fused.backends import BACKENDS


class TwoCalls(Contender):
    """An optimizer with the two calls of the field, which a subclass puts into ``wsam``."""

    wsam: Any

    @property
    def base_state(self) -> MutableMapping[Tensor, Any]:
        """The state of the base optimizer, by parameter."""
        return self.wsam.state

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
    backend: ClassVar[str] = "auto"
    temporary_lists = 1  # the copy of w, which parameters of low precision have

    def __init__(self, params: Sequence[Tensor], base: Base) -> None:
        super().__init__(params, base)
        self.wsam = WSAM(
            params, base.optimizer, rho=RHO, gamma=GAMMA, backend=self.backend, **base.options
        )

    @classmethod
    def unavailable(cls) -> str | None:
        """Why it cannot run here, or None."""
        if cls.backend == "auto":
            return None
        if cls.backend not in BACKENDS:
            return f"this version has no backend {cls.backend!r}"
        return BACKENDS[cls.backend].unavailable()

    @classmethod
    def moved(cls, base: Base) -> int:
        """Elements read and written per parameter and step."""
        # reduce 1, perturb 3; update is the fused base's pass and g2 (w is recomputed from g1).
        return 5 + base.fused_moved

    @classmethod
    def operations(cls, base: Base, dtype: torch.dtype) -> dict[str, Passes]:
        """Elements moved per parameter by each operation with parameters of ``dtype``."""
        # With low precision perturb writes a copy of w, too, and update reads it in place of p.
        copy = 1 if dtype.itemsize < torch.float32.itemsize else 0
        return {
            "reduce": Passes(1, 0),
            "perturb": Passes(3 + copy, 0),
            "update": Passes(4, 2 * base.states),
        }

    @classmethod
    def passes(cls, base: Base, dtype: torch.dtype) -> Passes:
        """Elements moved per parameter and step with parameters of ``dtype``."""
        values, states = zip(*cls.operations(base, dtype).values(), strict=True)
        return Passes(sum(values), sum(states))


class OursInBackward(Ours):
    """wsam_fused that updates within the second backward."""

    name = "wsam_fused, in the backward"

    def __init__(self, params: Sequence[Tensor], base: Base) -> None:
        super().__init__(params, base)
        self.handle = self.wsam.update_in_backward()


class OursCuda(Ours):
    """wsam_fused with its CUDA kernels."""

    name = "cuda"
    backend = "cuda"


class OursTriton(Ours):
    """wsam_fused with its Triton kernels."""

    name = "triton"
    backend = "triton"


class OursEager(Ours):
    """The reference that the kernels are tested against."""

    name = "eager"
    backend = "eager"


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
