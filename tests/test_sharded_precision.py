"""Sharded parameters with loss scales, float32 weights in the state, updates in the backward."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import BASES
from processes import result, results_of, run_on_ranks
from sharded_cases import METHODS, WAYS, full, problem, summary, train
from tolerances import TRAJECTORY, close
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard

from wsam_fused import WSAM

RANKS = 2
SCALE = 2.0**10
Found = dict[str, Tensor]


# ---- updates in the backward ---------------------------------------------------------------------


def in_backward(method: str, base: str, shards: bool) -> Found:
    model, x, y = problem()
    if shards:
        WAYS["fsdp"].shard(model)
        x, y = WAYS["fsdp"].share(x), WAYS["fsdp"].share(y)
    optimizer = METHODS[method](model.parameters(), BASES[base])
    if shards:
        with optimizer.update_in_backward():
            train(model, optimizer, x, y)
        assert all(param.grad is None for param in model.parameters())
    else:
        train(model, optimizer, x, y)
    return summary(model, optimizer)


# ---- weights in float32 --------------------------------------------------------------------------

# Every rank has the whole batch: their gradients are one, and so is the mean, in any dtype.
KEEPING: dict[str, dict[str, Any]] = {
    "master": {"master_weights": True},
    "narrow": {"master_weights": True, "state_dtype": "parameter"},
}


def low(keeping: str, shards: bool) -> list[Found]:
    """Train, and train on from a checkpoint with a new optimizer."""
    model, x, y = problem(torch.bfloat16)
    if shards:
        fully_shard(model)
    optimizer = WSAM(model.parameters(), BASES["adamw"], rho=0.1, **KEEPING[keeping])
    train(model, optimizer, x, y)
    found = [summary(model, optimizer)]
    if shards:
        state = get_optimizer_state_dict(model, optimizer)
        optimizer = WSAM(model.parameters(), BASES["adamw"], rho=0.1, **KEEPING[keeping])
        set_optimizer_state_dict(model, optimizer, copy.deepcopy(state))
    train(model, optimizer, x, y)
    return [*found, summary(model, optimizer)]


# ---- loss scales ---------------------------------------------------------------------------------


def scaled(way: str) -> Found:
    """As without a scaler, for a scale that only shifts exponents."""
    found = []
    for scaler in (None, GradScaler("cpu", init_scale=SCALE)):
        model, x, y = problem()
        WAYS["fsdp"].shard(model)
        run = Scaled(model, WAYS["fsdp"].share(x), WAYS["fsdp"].share(y), scaler)
        for _ in range(3):
            run.step(way)
        found.append(summary(model, run.optimizer))
    plain, with_scaler = found
    return {name: torch.equal(plain[name], with_scaler[name]) for name in plain}  # type: ignore[misc]


def overflow(way: str, evaluation: int) -> tuple[bool, float, bool]:
    """One number of one rank's gradient is infinite."""
    model, x, y = problem()
    fully_shard(model)
    run = Scaled(model, x, y, GradScaler("cpu", init_scale=SCALE))
    run.step(way)
    before = summary(model, run.optimizer)
    run.poisoned = evaluation
    run.step(way)
    after = summary(model, run.optimizer)
    names = [name for name in before if "grad_norm" not in name]
    same = all(torch.equal(after[name], before[name]) for name in names)
    assert run.scaler is not None
    scale = run.scaler.get_scale()
    run.poisoned = -1
    run.step(way)
    return same, scale, not torch.equal(full(model.first.weight), before["first.weight"])  # type: ignore[union-attr]


class Scaled:
    def __init__(self, model: Any, x: Tensor, y: Tensor, scaler: GradScaler | None) -> None:
        self.model, self.x, self.y, self.scaler = model, x, y, scaler
        self.optimizer = WSAM(model.parameters(), BASES["adamw"], rho=0.1, restore="backup")
        self.poisoned = -1
        self.evaluations = 0

    def closure(self) -> Tensor:
        loss = nn.functional.mse_loss(self.model(self.x), self.y)
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        if self.evaluations == self.poisoned and dist.get_rank() == 1:
            self.model.first.weight.grad._local_tensor[0, 0] = float("inf")
        self.evaluations += 1
        return loss

    def step(self, way: str) -> None:
        self.evaluations = 0
        self.optimizer.zero_grad()
        if way == "closure":
            self.optimizer.step(self.closure, scaler=self.scaler)
        else:
            self.closure()
            self.optimizer.first_step(zero_grad=True, scaler=self.scaler)
            self.closure()
            if self.scaler is None:
                self.optimizer.second_step()
            else:
                self.scaler.step(self.optimizer)
        if self.scaler is not None:
            self.scaler.update()


BACKWARD = [("wsam", "adamw"), ("sam", "sgdm"), ("sam-asam", "adamw")]
OVERFLOWS = [(way, evaluation) for way in ("closure", "calls") for evaluation in (0, 1)]
CASES: dict[str, Any] = {
    **{str(case): functools.partial(in_backward, *case, True) for case in BACKWARD},
    **{keeping: functools.partial(low, keeping, True) for keeping in KEEPING},
    **{way: functools.partial(scaled, way) for way in ("closure", "calls")},
    **{str(case): functools.partial(overflow, *case) for case in OVERFLOWS},
}


def worker() -> dict[str, Any]:
    return results_of(CASES)


@pytest.fixture(scope="module")
def runs() -> list[dict[str, Any]]:
    return run_on_ranks(worker, RANKS)


@pytest.mark.parametrize("case", BACKWARD, ids=str)
def test_updates_in_the_backward_equal_one_process(case: tuple[str, str], runs: list[Any]) -> None:
    expected = in_backward(*case, False)
    for found in result(runs, str(case)):
        assert found.keys() == expected.keys()
        for name, value in found.items():
            close(value, expected[name], TRAJECTORY, name)


@pytest.mark.parametrize("keeping", KEEPING)
def test_float32_weights_are_sharded_saved_and_loaded(keeping: str, runs: list[Any]) -> None:
    expected = low(keeping, False)
    for found in result(runs, keeping):
        for values, wanted in zip(found, expected, strict=True):
            assert values.keys() == wanted.keys()
            for name, value in values.items():
                assert value.dtype == wanted[name].dtype, name
                if "grad_norm" in name:  # the sum of the ranks' sums
                    close(value, wanted[name], TRAJECTORY, name)
                else:
                    assert torch.equal(value, wanted[name]), name
    assert any("master_weight" in name for name in expected[0])


@pytest.mark.parametrize("way", ["closure", "calls"])
def test_scaled_steps_are_the_same(way: str, runs: list[Any]) -> None:
    for found in result(runs, way):
        assert all(found.values()), [name for name, same in found.items() if not same]


@pytest.mark.parametrize("case", OVERFLOWS, ids=str)
def test_an_overflow_on_one_rank_is_one_on_all(case: tuple[str, int], runs: list[Any]) -> None:
    for same, scale, goes_on in result(runs, str(case)):
        assert same
        assert scale == SCALE / 2
        assert goes_on
