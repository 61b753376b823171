"""The formulation of WSAM's authors: a loop over tensors, one operation at a time.

Written from its description, with their order of operations and with what they keep: e, a clone
of g1 and the sharpness stay in the state from step to step.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.contenders.contender import EPS, RHO, WEIGHT, Base, Contender


class Authors(Contender):
    """As published, with the base optimizer's default implementation."""

    name = "authors"
    fused = False
    resident_lists = 3  # e, g1 and the sharpness
    temporary_lists = 2  # of the base optimizer's own operations

    def __init__(self, params: Sequence[Tensor], base: Base) -> None:
        super().__init__(params, base)
        self.optimizer = base.make(params, fused=True) if self.fused else base.make(params)
        self.state: dict[Tensor, dict[str, Tensor]] = defaultdict(dict)

    @classmethod
    def moved(cls, base: Base) -> int:
        """Elements read and written per parameter and step."""
        # norm 1, g * scale 2, p.add_ 3, clone 2.
        first = 8
        # p.sub_ 3, clone 2, minus g1 3, grad.mul_ 2, grad.add_ 3, and p.add_ 3 after the base.
        second = 16
        return first + second + (base.fused_moved if cls.fused else base.loop_moved)

    @torch.no_grad()
    def first(self) -> None:
        """Go to the ascent point and keep g1 and e."""
        norms = [torch.norm(p.grad, p=2) for p in self.params if p.grad is not None]
        scale = RHO / (torch.norm(torch.stack(norms), p=2) + EPS)
        for p in self.params:
            if p.grad is None:
                continue
            e_w = p.grad * scale
            p.add_(e_w)
            self.state[p]["e_w"] = e_w
        for p in self.params:
            if p.grad is not None:
                self.state[p]["grad"] = p.grad.clone()
        self._optimizer.zero_grad()

    @torch.no_grad()
    def second(self) -> None:
        """Subtract e, step the base with g1 and subtract the sharpness."""
        for p in self.params:
            if p.grad is not None:
                p.sub_(self.state[p]["e_w"])
        for p in self.params:
            if p.grad is None:
                continue
            state = self.state[p]
            state["sharpness"] = p.grad.clone() - state["grad"]
            p.grad.mul_(0.0).add_(state["grad"])
        self._optimizer.step()
        lr = self._optimizer.param_groups[0]["lr"]
        for p in self.params:
            if p.grad is not None:
                p.add_(self.state[p]["sharpness"], alpha=-lr * WEIGHT)

    @property
    def _optimizer(self) -> torch.optim.Optimizer:
        assert self.optimizer is not None
        return self.optimizer

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint would hold: theirs has the scratch, too."""
        return {"scratch": list(self.state.values()), "base": super().state_dict()}


class AuthorsFused(Authors):
    """As published, with ``fused=True`` in the base optimizer."""

    name = "authors-fused"
    fused = True
