"""What all contenders have in common: the step they make, its settings, and its base optimizers."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

RHO = 0.05
GAMMA = 0.9
WEIGHT = GAMMA / (1.0 - GAMMA)
EPS = 1e-12


@dataclass(frozen=True)
class Base:
    """A base optimizer of ``torch.optim`` and what its step moves.

    Attributes:
        name: As in the tables.
        optimizer: The class.
        options: Its hyper-parameters.
        fused_moved: Elements moved per parameter with ``fused=True``: one pass.
        loop_moved: Likewise as a sequence of element-wise operations, looped or foreach.
    """

    name: str
    optimizer: type[Optimizer]
    options: dict[str, Any]
    fused_moved: int
    loop_moved: int

    @property
    def states(self) -> int:
        """State tensors per parameter: the fused pass reads p and g, writes p, and does both here.

        With AdamW these are m and v.
        """
        return (self.fused_moved - 3) // 2

    def make(self, params: Sequence[Tensor], **how: bool) -> Optimizer:
        """Construct the optimizer; ``how`` is ``fused`` or ``foreach``."""
        return self.optimizer(params, **self.options, **how)  # type: ignore[arg-type]


BASES = {
    # One pass reads p, g, buf and writes p, buf. In operations: g + wd p 3, buf.mul_ 2,
    # buf.add_ 3, p.add_ 3.
    "SGDM": Base(
        "SGDM", torch.optim.SGD, {"lr": 1e-3, "momentum": 0.9, "weight_decay": 5e-4}, 5, 11
    ),
    # One pass reads p, g, m, v and writes p, m, v. In operations: p.mul_ 2, m.lerp_ 3, v.mul_ 2,
    # v.addcmul_ 3, sqrt 2, div 2, add_ 2, p.addcdiv_ 4.
    "AdamW": Base("AdamW", torch.optim.AdamW, {"lr": 1e-3, "weight_decay": 0.01}, 7, 20),
}


class Passes(NamedTuple):
    """Elements read and written per parameter, by the dtype that they have.

    Attributes:
        values: In the parameters' dtype: weights, gradients and what has their dtype.
        states: In the dtype of the base optimizer's state.
    """

    values: int
    states: int

    def bytes(self, dtype: torch.dtype, state_dtype: torch.dtype) -> int:
        """Return the bytes per parameter."""
        return self.values * dtype.itemsize + self.states * state_dtype.itemsize


class Contender:
    """One implementation of a decoupled WSAM step.

    Both halves find their gradients in ``.grad``. They may write to those of the second.

    Args:
        params: The parameters.
        base: The base optimizer.

    Attributes:
        name: As in the tables.
        gradients: How many it needs.
        resident_lists: Tensor lists of the parameters' size that it keeps from step to step
            besides the base optimizer's state.
        temporary_lists: Such lists that live only within a step, at most at one time.
        optimizer: The ``torch.optim`` optimizer that holds m and v, if it is one. Contenders that
            run side by side share its state.
    """

    name: ClassVar[str]
    gradients: ClassVar[int] = 2
    resident_lists: ClassVar[int] = 0
    temporary_lists: ClassVar[int] = 0
    optimizer: Optimizer | None = None

    def __init__(self, params: Sequence[Tensor], base: Base) -> None:
        self.params = list(params)
        self.base = base

    @classmethod
    def unavailable(cls) -> str | None:
        """Why it cannot run here, or None."""
        return None

    @classmethod
    def moved(cls, base: Base) -> int:
        """Elements read and written per parameter and step."""
        raise NotImplementedError

    @classmethod
    def passes(cls, base: Base, dtype: torch.dtype) -> Passes:
        """Elements moved per parameter and step with parameters of ``dtype``.

        torch makes the states and all temporaries in the parameters' dtype, whatever it is.
        """
        return Passes(cls.moved(base), 0)

    @property
    def base_state(self) -> MutableMapping[Tensor, Any]:
        """The state of the base optimizer, by parameter."""
        assert self.optimizer is not None
        return self.optimizer.state

    def first(self) -> None:
        """Go to the ascent point and take the gradients out of ``.grad``."""
        raise NotImplementedError

    def second(self) -> None:
        """Come back and update."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint would hold."""
        assert self.optimizer is not None
        return self.optimizer.state_dict()

    def take_gradients(self) -> list[Tensor]:
        """Take the gradients out of ``.grad`` without a copy."""
        taken = []
        for param in self.params:
            assert param.grad is not None
            taken.append(param.grad)
            param.grad = None
        return taken
