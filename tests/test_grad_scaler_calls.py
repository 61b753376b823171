"""Mistakes with a ``torch.amp.GradScaler``, and steps that it begins itself."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from cases import BASES, FOREIGN_BASES, METHODS
from scaled_run import SCALE, Run, compare, scaler_of, weights, with_second_evaluation
from torch import Tensor, nn

from wsam_fused import SAM, WSAM


def test_a_closure_is_not_given_to_the_scaler() -> None:
    run = Run(WSAM, BASES["sgd"], scaler_of())
    assert run.scaler is not None
    run.backward()
    before = weights(run)
    with pytest.raises(RuntimeError, match="Closure use is not currently supported"):
        run.scaler.step(run.optimizer, closure=run.backward)
    with pytest.raises(RuntimeError, match=r"call optimizer.step\(closure, scaler=scaler\)"):
        run.scaler.step(run.optimizer, run.backward)
    assert all(map(torch.equal, weights(run), before))


def test_first_step_has_to_know_the_scaler() -> None:
    run = Run(WSAM, BASES["sgd"], scaler_of(), restore="backup")
    assert run.scaler is not None
    before = weights(run)
    run.backward()
    run.optimizer.first_step(zero_grad=True)
    run.backward()
    with pytest.raises(RuntimeError, match=r"call first_step\(zero_grad=True, scaler=scaler\)"):
        run.scaler.step(run.optimizer)
    assert all(map(torch.equal, weights(run), before))


def test_unscaled_too_early_or_stepped_twice() -> None:
    run = Run(WSAM, BASES["sgd"], scaler_of())
    scaler = run.scaler
    assert scaler is not None
    run.backward()
    scaler.unscale_(run.optimizer)
    with pytest.raises(RuntimeError, match=r"scaler.unscale_\(\) was called before"):
        run.optimizer.first_step(zero_grad=True, scaler=scaler)
    assert not run.optimizer.is_perturbed
    scaler.update()
    run.optimizer.zero_grad()
    run.optimizer.step(run.backward, scaler=scaler)
    with pytest.raises(RuntimeError, match=r"since scaler.update\(\) was called last"):
        run.optimizer.step(run.backward, scaler=scaler)
    assert not run.optimizer.is_perturbed


def test_no_scaler_at_all() -> None:
    run = Run(WSAM, BASES["sgd"], None)
    run.backward()
    with pytest.raises(TypeError, match=r"scaler is float, expected a torch\.amp"):
        run.optimizer.first_step(zero_grad=True, scaler=2.0)
    assert not run.optimizer.is_perturbed


def test_float16_without_a_scaler_warns_once() -> None:
    param = nn.Parameter(torch.randn(4, dtype=torch.float16))
    optimizer = SAM([param], BASES["sgd"])

    def closure() -> Tensor:
        loss = param.square().sum()
        loss.backward()
        return loss

    with pytest.warns(UserWarning, match="no GradScaler was given; call scaler.scale"):
        optimizer.step(closure)
    optimizer.step(closure)  # a second warning would be an error
    other = copy.deepcopy(param).detach().bfloat16().requires_grad_()
    quiet = SAM([other], BASES["sgd"])
    other.grad = torch.ones_like(other)
    quiet.first_step(zero_grad=True)


@pytest.mark.parametrize("unscales", [False, True])
@pytest.mark.parametrize("base", ["adamw", "rmsprop"])
@pytest.mark.parametrize("method", ["sam", "wsam", "gsam", "bsam"])
def test_a_scaler_makes_whole_steps(method: str, base: str, unscales: bool) -> None:
    way = functools.partial(with_second_evaluation, unscales=unscales)
    compare(way, METHODS[method], {**BASES, **FOREIGN_BASES}[base], rho=0.1)


@pytest.mark.parametrize("unscales", [False, True])
@pytest.mark.parametrize("evaluation", [0, 1])
def test_a_scaler_that_makes_whole_steps_backs_off(evaluation: int, unscales: bool) -> None:
    run = Run(WSAM, BASES["adamw"], scaler_of(), rho=0.1, restore="backup")
    with_second_evaluation(run, unscales=unscales)
    before = run.tensors()
    run.poison = evaluation
    with_second_evaluation(run, unscales=unscales)
    assert all(map(torch.equal, run.tensors(), before))
    assert run.scaler is not None
    assert run.scaler.get_scale() == SCALE / 2


def test_a_scaler_that_makes_whole_steps_has_to_be_known() -> None:
    run = Run(WSAM, BASES["sgd"], scaler_of())
    assert run.scaler is not None
    before = weights(run)
    run.backward()
    run.optimizer.second_evaluation = run.backward
    with pytest.raises(RuntimeError, match="set second_evaluation_scaler to the scaler"):
        run.scaler.step(run.optimizer)
    assert all(map(torch.equal, weights(run), before))


def test_not_with_updates_in_the_backward() -> None:
    run = Run(WSAM, BASES["sgd"], scaler_of())
    run.optimizer.update_in_backward()
    run.backward()
    with pytest.raises(RuntimeError, match=r"given a scaler while update_in_backward\(\) is"):
        run.optimizer.first_step(zero_grad=True, scaler=run.scaler)
    assert not run.optimizer.is_perturbed


@pytest.mark.parametrize("way", ["calls", "second_evaluation"])
def test_an_overflow_does_not_skip_later_steps(way: str) -> None:
    """With ``every``, the steps after it are plain ones, of which the scaler says nothing."""
    run = Run(SAM, BASES["sgd"], scaler_of(), rho=0.1, every=3)
    make = Run.by_calls if way == "calls" else with_second_evaluation
    assert run.scaler is not None
    moved = []
    for number in range(1, 8):
        before = weights(run)
        run.poison = 1 if number == 3 else None
        make(run)
        moved.append(not all(map(torch.equal, weights(run), before)))
    assert run.scaler.get_scale() == SCALE / 2
    assert moved[3:] == [True] * 4


def test_ways_of_scaling_may_change_after_an_overflow() -> None:
    run = Run(SAM, BASES["sgd"], scaler_of(), rho=0.1)
    assert run.scaler is not None
    run.poison = 1
    run.by_calls()
    run.poison = None
    before = weights(run)
    run.by_closure()
    assert run.scaler.get_scale() == SCALE / 2
    assert not all(map(torch.equal, weights(run), before))


def test_a_step_of_the_scaler_that_fails_leaves_nothing_behind() -> None:
    run = Run(WSAM, BASES["sgd"], scaler_of(), restore="backup")
    scaler = run.scaler
    assert scaler is not None
    run.backward()
    with pytest.raises(RuntimeError, match="nothing is pending"):
        scaler.step(run.optimizer)
    scaler.update()
    run.optimizer.zero_grad()
    run.by_closure()
    run.by_calls()
    assert not run.optimizer.is_perturbed
