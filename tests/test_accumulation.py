"""Several backward calls in an evaluation: the step of one large batch, with one perturbation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import BASES, METHODS
from comparison import compare_and_align
from tolerances import ONE_STEP, close
from torch import Tensor, nn

F64 = torch.float64
PARTS = 4
EACH = pytest.mark.parametrize("method", ["sam", "wsam", "coupled", "gsam", "bsam"])
FORMS = pytest.mark.parametrize("form", ["closure", "calls", "calls-that-keep"])


class Run:
    """A model, a batch of 12 that changes from step to step, and an optimizer."""

    def __init__(self, method: str, base: str, dropout: float = 0.0, **options: Any) -> None:
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Linear(3, 6), nn.Tanh(), nn.Dropout(dropout), nn.Linear(6, 2)
        ).to(F64)
        self.x = torch.randn(12, 3, dtype=F64)
        self.y = torch.randn(12, 2, dtype=F64)
        self.optimizer = METHODS[method](self.net.parameters(), BASES[base], **options)
        self.losses: list[Tensor] = []

    def evaluate(self, parts: int) -> Tensor:
        """Add up the gradients of the mean loss over all samples, in parts of the same size."""
        total = torch.zeros((), dtype=F64)
        for x, y in zip(self.x.chunk(parts), self.y.chunk(parts), strict=True):
            loss = nn.functional.mse_loss(self.net(x), y) / parts
            loss.backward()
            total += loss.detach()
            self.losses.append(loss.detach())
        return total

    def step(self, form: str, parts: int) -> None:
        self.x = self.x.roll(1, 1) + 0.1
        optimizer = self.optimizer
        if form == "closure":

            def closure() -> Tensor:
                optimizer.zero_grad()
                return self.evaluate(parts)

            optimizer.step(closure)
            return
        calls = [optimizer.first_step, optimizer.second_step]
        calls += [optimizer.third_step] if optimizer.evaluations == 3 else []
        for call in calls:
            self.evaluate(parts)
            call(zero_grad=form == "calls")
            optimizer.zero_grad()

    def gradient(self) -> list[Tensor]:
        """Of the mean loss over all samples, at the weights as they are."""
        loss = nn.functional.mse_loss(self.net(self.x), self.y)
        return list(torch.autograd.grad(loss, list(self.net.parameters())))


@FORMS
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.05}, {"geometry": "adaptive"}])
@pytest.mark.parametrize("base", ["sgdm", "adamw"])
@EACH
def test_it_is_the_step_of_the_whole_batch(
    method: str, base: str, options: dict[str, Any], form: str
) -> None:
    options = {"rho": 0.1, **options}
    accumulated, whole = Run(method, base, **options), Run(method, base, **options)
    for number in range(4):
        accumulated.step(form, PARTS)
        whole.step("closure", 1)
        if form == "closure":
            ours, theirs = accumulated.optimizer.last.loss, whole.optimizer.last.loss
            close(ours, theirs, ONE_STEP[F64], "the loss")
        compare_and_align(accumulated.optimizer, whole.optimizer, F64, f"step {number}")
    assert len(accumulated.losses) == PARTS * len(whole.losses)


@FORMS
def test_sums_are_clipped_not_parts(form: str) -> None:
    """WSAM over SGD by its formula: e from the unclipped sum, both sums clipped in the update."""
    limit, rho, weight, lr = 0.05, 0.1, 9.0, 0.05
    run = Run("wsam", "sgd", rho=rho, max_grad_norm=limit)
    params = list(run.net.parameters())
    w = [param.detach().clone() for param in params]
    run.step(form, PARTS)
    found = [param.detach().clone() for param in params]

    def at(point: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        with torch.no_grad():
            torch._foreach_copy_(params, point)
        grads = run.gradient()
        return grads, torch.cat([g.reshape(-1) for g in grads]).norm()

    g1, norm1 = at(w)
    g2, norm2 = at([p + rho / norm1 * g for p, g in zip(w, g1, strict=True)])
    assert norm1 > limit
    assert norm2 > limit
    for p, a, b, ours in zip(w, g1, g2, found, strict=True):
        a, b = a * (limit / (norm1 + 1e-6)), b * (limit / (norm2 + 1e-6))  # as clip_grad_norm_
        close(ours, p - lr * (a + weight * (b - a)), ONE_STEP[F64], "the weights")


@pytest.mark.parametrize("method", ["sam", "wsam", "coupled", "gsam"])
def test_a_list_of_closures_is_something_else(method: str) -> None:
    """There every part has a perturbation of its own; were they equal, one would be superfluous."""
    runs = [Run(method, "sgdm", rho=0.5) for _ in range(2)]

    def closure_of(x: Tensor, y: Tensor) -> Callable[[], Tensor]:
        def closure() -> Tensor:
            loss = nn.functional.mse_loss(runs[1].net(x), y)
            loss.backward()
            return loss

        return closure

    runs[0].step("closure", PARTS)
    runs[1].x = runs[0].x
    parts = zip(runs[1].x.chunk(PARTS), runs[1].y.chunk(PARTS), strict=True)
    runs[1].optimizer.step([closure_of(*part) for part in parts])
    for ours, theirs in zip(runs[0].net.parameters(), runs[1].net.parameters(), strict=True):
        assert not torch.allclose(ours, theirs, rtol=1e-6)


def test_every_part_has_its_dropout_masks_again() -> None:
    run = Run("sam", "sgdm", dropout=0.5, rho=0.0, replay_rng=True)
    run.step("closure", PARTS)
    first, second = run.losses[:PARTS], run.losses[PARTS:]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert len({loss.item() for loss in first}) == PARTS
