"""SAM, WSAM and BSAM over SGD and AdamW as their papers write them: the model of random calls.

Plain float64, no memory shared with anything, one parameter after the other. It knows at which
point of a step it is and what every call does there, and nothing of how the package does it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Setup(NamedTuple):
    """What an optimizer was made with.

    Attributes:
        method: ``sam``, ``wsam``, ``coupled`` or ``bsam``.
        base: ``sgd`` or ``adamw``.
        geometry: Of the perturbation.
        options: Arguments of the constructor that do not change: ``every``, ``max_grad_norm``,
            ``check_finite``, and those that must not matter.
        hyper: What a new group has: ``lr``, ``rho``, ``gamma``, and constants of the base.
        decaying: Whether ``rho`` is that of ``hyper`` divided by the square root of the step.
    """

    method: str
    base: str
    geometry: str
    options: dict[str, Any]
    hyper: dict[str, float]
    decaying: bool

    @property
    def evaluations(self) -> int:
        return 3 if self.method == "bsam" else 2


@dataclass
class ModelParam:
    """A parameter: its weights, where it is, its gradient, and those that a step has read."""

    weights: Tensor
    group: int
    point: Tensor = field(init=False)
    grad: Tensor | None = None
    read: list[Tensor | None] = field(default_factory=list)
    states: dict[str, Tensor] = field(default_factory=dict)
    updates: int = 0

    def __post_init__(self) -> None:
        self.point = self.weights


class Snapshot(NamedTuple):
    """What a checkpoint holds."""

    hyper: list[dict[str, float]]
    states: list[dict[str, Tensor]]
    updates: list[int]
    steps: int


class ModelOfSteps:
    """The state of an optimizer, and what its calls do to it.

    Args:
        setup: What it was made with.
    """

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.params: list[ModelParam] = []
        self.hyper: list[dict[str, float]] = []
        self.steps = 0
        self.skipped = 0
        self.read = 0  # gradients that the step in progress has taken

    def add_group(self, tensors: list[Tensor]) -> None:
        """Add parameters with the hyper-parameters that a new group has."""
        group = len(self.hyper)
        self.hyper.append(dict(self.setup.hyper))
        self.params += [ModelParam(tensor.double().clone(), group) for tensor in tensors]

    @property
    def is_plain(self) -> bool:
        """Whether the next step is one of the base optimizer."""
        return (self.steps + 1) % self.setup.options["every"] != 0

    # ---- calls -------------------------------------------------------------------------------

    def first_step(self, zero_grad: bool) -> None:
        """Read g1; perturb, or make a step of the base optimizer."""
        self._read(zero_grad)
        if self.setup.decaying:
            for hyper in self.hyper:
                hyper["rho"] = self.setup.hyper["rho"] / math.sqrt(self.steps + 1)
        if self.is_plain:
            self._update(lambda g, hyper: (g[0], None), 1)
            return
        self._move(1.0, "rho")

    def second_step(self, zero_grad: bool) -> None:
        """Read g2; update, or go to the other side."""
        self._read(False)
        if self.setup.evaluations == 2:
            self._update(self._combined, 2)
        else:
            self._move(-1.0, "rho_min")
        self._clear(zero_grad)

    def third_step(self, zero_grad: bool) -> None:
        """Read g3 and update."""
        self._read(False)
        norms = [self._norm(k) * self._clip(k) for k in range(3)]
        ratio = norms[1] / norms[2] if norms[2] > 0 else 0.0
        self._update(lambda g, hyper: (g[0] + g[1] - ratio * g[2], None), 3)
        self._clear(zero_grad)

    def restore(self) -> None:
        """Go back to the weights and forget the step."""
        self.read = 0
        for param in self.params:
            param.point, param.read = param.weights, []

    def zero_grad(self, set_to_none: bool) -> None:
        """Clear the gradients."""
        for param in self.params:
            if set_to_none or param.grad is None:
                param.grad = None
            else:
                param.grad = torch.zeros_like(param.grad)

    def snapshot(self) -> Snapshot:
        """Return what a checkpoint holds."""
        states = [{k: v.clone() for k, v in param.states.items()} for param in self.params]
        updates = [param.updates for param in self.params]
        return Snapshot([dict(hyper) for hyper in self.hyper], states, updates, self.steps)

    def load(self, saved: Snapshot) -> None:
        """Take over a checkpoint of as many groups."""
        self.hyper = [dict(hyper) for hyper in saved.hyper]
        self.steps = saved.steps
        pairs = zip(self.params, saved.states, saved.updates, strict=True)
        for param, states, updates in pairs:
            param.states, param.updates = {k: v.clone() for k, v in states.items()}, updates

    # ---- the formulas ------------------------------------------------------------------------

    def _read(self, clear: bool) -> None:
        for param in self.params:
            param.read.append(None if param.grad is None else param.grad.clone())
        self.read += 1
        self._clear(clear)

    def _clear(self, clear: bool) -> None:
        if clear:
            self.zero_grad(True)

    def _metric(self, param: ModelParam) -> Tensor | float:
        g, eta = param.read[0], self.setup.options.get("eta", 0.0)
        assert g is not None
        if self.setup.geometry == "adaptive":
            return (param.weights.abs() + eta) ** 2
        return 1 / (1 + eta * g * g) if self.setup.geometry == "fisher" else 1.0

    def _metric_norm(self) -> float:
        terms = [self._metric(p) * p.read[0] ** 2 for p in self.params if p.read[0] is not None]
        return math.sqrt(sum(float(term.sum()) for term in terms))

    def _norm(self, k: int) -> float:
        found = [param.read[k] for param in self.params]
        return math.sqrt(sum(float((g * g).sum()) for g in found if g is not None))

    def _move(self, side: float, radius: str) -> None:
        norm = self._metric_norm()
        if not math.isfinite(norm):
            return
        for param in self.params:
            g = param.read[0]
            if g is not None:
                scale = side * self.hyper[param.group][radius] / (norm + 1e-12) if norm > 0 else 0.0
                param.point = param.weights + scale * self._metric(param) * g

    def _clip(self, k: int) -> float:
        largest = self.setup.options.get("max_grad_norm")
        return 1.0 if largest is None else min(1.0, largest / (self._norm(k) + 1e-6))

    def _combined(
        self, g: list[Tensor], hyper: Mapping[str, float]
    ) -> tuple[Tensor, Tensor | None]:
        if self.setup.method == "sam":
            return g[1], None
        weight = hyper["gamma"] / (1 - hyper["gamma"])
        if self.setup.method == "wsam":
            return g[0], weight * (g[1] - g[0])
        return (1 - weight) * g[0] + weight * g[1], None

    def _is_finite(self) -> bool:
        options = self.setup.options
        all_known = options.get("max_grad_norm") is not None or options.get("check_finite")
        known = self.read if all_known or self.read == 3 else 1
        return all(
            math.isfinite(norm) for norm in [self._metric_norm(), *map(self._norm, range(known))]
        )

    def _update(self, combine: Callable[..., tuple[Tensor, Tensor | None]], needed: int) -> None:
        if self._is_finite():
            clips = [self._clip(k) for k in range(needed)]
            for param in self.params:
                grads = [g for g in param.read[:needed] if g is not None]
                if len(grads) == needed:
                    clipped = [c * g for c, g in zip(clips, grads, strict=True)]
                    hyper = self.hyper[param.group]
                    h, d = combine(clipped, hyper)
                    param.weights = self._base_step(param, h, hyper)
                    if d is not None:
                        param.weights = param.weights - hyper["lr"] * d
        else:
            self.skipped += 1
        self.steps += 1
        self.restore()

    def _base_step(self, param: ModelParam, h: Tensor, hyper: Mapping[str, float]) -> Tensor:
        param.updates += 1
        w, lr, decay = param.weights, hyper["lr"], hyper["weight_decay"]
        zero = torch.zeros_like(w)
        if self.setup.base == "adamw":
            m = param.states["exp_avg"] = 0.9 * param.states.get("exp_avg", zero) + 0.1 * h
            v = 0.99 * param.states.get("exp_avg_sq", zero) + 0.01 * h * h
            param.states["exp_avg_sq"] = v
            m_hat, v_hat = m / (1 - 0.9**param.updates), v / (1 - 0.99**param.updates)
            return w * (1 - lr * decay) - lr * m_hat / (v_hat.sqrt() + 1e-8)
        u = h + decay * w
        if hyper["momentum"] == 0:
            return w - lr * u
        share = 1.0 if param.updates == 1 else 1 - hyper["dampening"]
        buffer = hyper["momentum"] * param.states.get("momentum_buffer", zero) + share * u
        param.states["momentum_buffer"] = buffer
        return w - lr * buffer
