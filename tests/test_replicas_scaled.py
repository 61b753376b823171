"""Replicas that perturb apart, with loss scales; an overflow on one rank is one on all."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import BASES, METHODS
from processes import result, results_of, run_on_ranks
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn.parallel import DistributedDataParallel

RANKS = 2
SCALE = 2.0**10
APART = ("sam", "wsam", "gsam", "bsam")


class Run:
    """One rank with a batch of its own."""

    def __init__(self, method: str, scaler: GradScaler | None, scope: str) -> None:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1)).double()
        self.model = DistributedDataParallel(net)
        self.x = torch.randn(RANKS, 12, 5, dtype=torch.float64)[dist.get_rank()]
        self.optimizer = METHODS[method](
            net.parameters(), BASES["adamw"], rho=0.1, model=self.model, perturb_scope=scope
        )
        self.scaler = scaler
        self.poisoned, self.evaluations = -1, 0

    def closure(self) -> Tensor:
        loss = (self.model(self.x).squeeze(1) - self.x.sum(1)).square().mean()
        if self.evaluations == self.poisoned and dist.get_rank() == 1:
            loss = loss * float("inf")
        self.evaluations += 1
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        return loss

    def by_closure(self) -> None:
        self.optimizer.zero_grad()
        self.evaluations = 0
        self.optimizer.step(self.closure, scaler=self.scaler)
        self.update()

    def by_calls(self) -> None:
        self.optimizer.zero_grad()
        self.evaluations = 0
        with self.model.no_sync():
            self.closure()
        self.optimizer.first_step(zero_grad=True, scaler=self.scaler)
        self.closure()
        self.optimizer.step() if self.scaler is None else self.scaler.step(self.optimizer)
        self.update()

    def update(self) -> None:
        if self.scaler is not None:
            self.scaler.update()

    def weights(self) -> Tensor:
        return torch.cat([param.detach().flatten() for param in self.model.parameters()])


WAYS = {"closure": Run.by_closure, "calls": Run.by_calls}


def equal(method: str, way: str, scope: str) -> bool:
    found = []
    for scaler in (None, GradScaler("cpu", init_scale=SCALE)):
        run = Run(method, scaler, scope)
        start = run.weights()
        for _ in range(3):
            WAYS[way](run)
        assert not torch.equal(run.weights(), start)
        found.append(run.weights())
    return torch.equal(*found)


def overflow(method: str, way: str, evaluation: int) -> tuple[bool, float, Tensor]:
    scaler = GradScaler("cpu", init_scale=SCALE)
    run = Run(method, scaler, "local")
    WAYS[way](run)
    before = run.weights()
    run.poisoned = evaluation
    WAYS[way](run)
    same = torch.equal(run.weights(), before)
    scale = scaler.get_scale()
    run.poisoned = -1
    WAYS[way](run)
    return same, scale, run.weights()


EQUAL = [
    *[(method, "closure", scope) for method in APART for scope in ("local", "global")],
    ("wsam", "calls", "local"),
    ("sam", "calls", "local"),
]
OVERFLOWS = [
    *[(method, "closure", evaluation) for method in APART for evaluation in (0, 1)],
    ("wsam", "calls", 0),
    ("wsam", "calls", 1),
    ("sam", "calls", 0),
]
CASES: dict[str, Any] = {
    **{str(case): functools.partial(equal, *case) for case in EQUAL},
    **{str(case): functools.partial(overflow, *case) for case in OVERFLOWS},
}


def worker() -> dict[str, Any]:
    return results_of(CASES)


@pytest.fixture(scope="module")
def runs() -> list[dict[str, Any]]:
    return run_on_ranks(worker, RANKS)


@pytest.mark.parametrize("case", EQUAL, ids=str)
def test_scaled_steps_are_the_same(case: tuple[str, str, str], runs: list[Any]) -> None:
    assert result(runs, str(case)) == [True, True]


@pytest.mark.parametrize("case", OVERFLOWS, ids=str)
def test_an_overflow_on_one_rank_is_one_on_all(case: tuple[str, str, int], runs: list[Any]) -> None:
    found = result(runs, str(case))
    for same, scale, _ in found:
        assert same
        assert scale == SCALE / 2
    assert torch.equal(found[0][2], found[1][2]), "the replicas are one"
