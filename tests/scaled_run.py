"""A small model that is trained with a GradScaler, in every way that there is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

SCALE = 2.0**10


def scaler_of(scale: float = SCALE) -> GradScaler:
    return GradScaler("cpu", init_scale=scale, growth_interval=1000)


class Run:
    """A small model that is trained in float64, with a scaler or without."""

    def __init__(self, method: Any, base: Any, scaler: GradScaler | None, **options: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1)).double()
        self.data = torch.randn(12, 5, dtype=torch.float64)
        self.optimizer = method(self.model.parameters(), base, **options)
        self.scaler = scaler
        self.poison: int | None = None  # the evaluation whose loss overflows
        self.evaluations = 0

    def losses_of(self, index: Tensor | None = None) -> Tensor:
        x = self.data if index is None else self.data[index]
        losses = (self.model(x).squeeze(1) - x.sum(1)).square()
        if self.evaluations == self.poison:
            losses = losses * float("inf")
        self.evaluations += 1
        return losses

    def backward(self, rows: slice = slice(None)) -> Tensor:
        loss = self.losses_of(torch.arange(12)[rows]).mean()
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        return loss

    def by_closure(self) -> None:
        self.optimizer.step(self.backward, scaler=self.scaler)
        self.update()

    def by_calls(self) -> None:
        optimizer, scaler = self.optimizer, self.scaler
        optimizer.zero_grad()
        self.backward()
        optimizer.first_step(zero_grad=True, scaler=scaler)
        if optimizer.is_perturbed:
            self.backward()
            if optimizer.evaluations == 3:
                optimizer.second_step(zero_grad=True)
                self.backward()
            optimizer.step() if scaler is None else scaler.step(optimizer)
        self.update()

    def by_parts(self) -> None:
        parts = [lambda: self.backward(slice(0, 6)), lambda: self.backward(slice(6, 12))]
        self.optimizer.step(parts, scaler=self.scaler)
        self.update()

    def by_sample(self) -> None:
        self.optimizer.step(self.losses_of, scaler=self.scaler)
        self.update()

    def update(self) -> None:
        self.evaluations = 0
        if self.scaler is not None:
            self.scaler.update()

    def tensors(self) -> list[Tensor]:
        params = list(self.model.parameters())
        states = [v for p in params for v in self.optimizer.state[p].values()]
        return [t.detach().clone() for t in [*params, *states] if isinstance(t, Tensor)]


WAYS: dict[str, Callable[[Run], None]] = {"closure": Run.by_closure, "calls": Run.by_calls}
WAY = pytest.mark.parametrize("way", WAYS)


def equal(one: Run, other: Run) -> None:
    for a, b in zip(one.tensors(), other.tensors(), strict=True):
        assert torch.equal(a, b)


def compare(way: Callable[[Run], None], method: Any, base: Any, **options: Any) -> None:
    plain = Run(method, base, None, **options)
    scaled = Run(method, base, scaler_of(), **options)
    start = plain.tensors()
    for _ in range(3):
        way(plain)
        way(scaled)
        assert scaled.scaler is not None
        assert scaled.scaler.get_scale() == SCALE
        equal(plain, scaled)
    assert not torch.equal(start[0], plain.tensors()[0])
    for name in ("grad_norm", "second_grad_norm", "cosine"):
        norm, expected = getattr(scaled.optimizer.last, name), getattr(plain.optimizer.last, name)
        if expected is not None:
            assert torch.equal(norm, expected), name


def weights(run: Run) -> list[Tensor]:
    return [param.detach().clone() for param in run.model.parameters()]


def with_second_evaluation(run: Run, *, unscales: bool = False) -> None:
    """As a framework does: backward, scaler.step(optimizer), scaler.update()."""
    optimizer, scaler = run.optimizer, run.scaler
    optimizer.zero_grad()
    run.backward()
    optimizer.second_evaluation = run.backward
    if scaler is None:
        optimizer.step()
    else:
        optimizer.second_evaluation_scaler = scaler
        if unscales:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
    run.update()
