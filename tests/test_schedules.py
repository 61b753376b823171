"""Radii that follow the step or the learning rate, and plain steps between (``every``)."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from cases import BASES, METHODS, parameters, set_gradients, step
from golden_runs import CASES
from problems import array
from torch.optim import SGD

from wsam_fused import BSAM, SAM, WSAM
from wsam_fused.schedules import InverseSqrt, ProportionalToLR


def radii(optimizer: Any, params: list[torch.nn.Parameter], steps: int) -> list[float]:
    """Make steps and measure how far the ascent point is from the weights."""
    found = []
    for number in range(steps):
        before = [param.detach().clone() for param in params]
        set_gradients(params, number)
        optimizer.first_step(zero_grad=True)
        moves = [(p - w).square().sum() for p, w in zip(params, before, strict=True)]
        found.append(torch.stack(moves).sum().sqrt().item())
        if optimizer.is_perturbed:
            set_gradients(params, number)
            optimizer.second_step(zero_grad=True)
    return found


def test_a_function_of_the_step(backend: str) -> None:
    params = parameters("unaligned", torch.float64)
    optimizer = SAM(params, SGD, rho=lambda step: 0.1 * step, lr=0.1, backend=backend)
    assert optimizer.param_groups[0]["rho"] == pytest.approx(0.1)
    assert radii(optimizer, params, 3) == pytest.approx([0.1, 0.2, 0.3])
    assert optimizer.param_groups[0]["rho"] == pytest.approx(0.3)


def test_inverse_sqrt_is_that_of_the_paper(backend: str) -> None:
    case = next(case for case in CASES if case["name"] == "sam-rhosqrt-sgdm-l2-logit")
    expected = array(case["name"], "rho")
    schedule = InverseSqrt(case["hyper"]["rho"])
    assert [schedule(step) for step in range(1, 21)] == pytest.approx(expected.tolist())
    params = parameters("unaligned", torch.float64)
    optimizer = WSAM(params, SGD, rho=InverseSqrt(0.3), lr=0.1, backend=backend)
    assert radii(optimizer, params, 4) == pytest.approx([0.3 / math.sqrt(t) for t in (1, 2, 3, 4)])


@pytest.mark.parametrize(
    "case", [case for case in CASES if "sched" in case], ids=lambda c: c["name"]
)
def test_proportional_is_that_of_the_authors_from_the_second_step(case: dict[str, Any]) -> None:
    hyper, name = case["hyper"], case["name"]
    key = "rho" if case["method"] == "gsam" else "rho_min"
    high, low = (
        (hyper["rho_max"], hyper["rho_min"])
        if key == "rho"
        else (hyper["rho_min_max"], hyper["rho_min_min"])
    )
    lr, expected = array(name, "lr"), array(name, key)
    schedule = ProportionalToLR(high, low, lr_high=float(lr.max()), lr_low=case["sched"]["lr_min"])
    found = [schedule.at_learning_rate(float(rate)) for rate in lr]
    assert found[1:] == pytest.approx(expected[1:].tolist())
    assert (found[0], expected[0]) == (pytest.approx(high), pytest.approx(low))


def test_proportional_follows_the_learning_rate_of_the_step(backend: str) -> None:
    params = parameters("unaligned", torch.float64)
    schedule = ProportionalToLR(0.4, 0.2, lr_high=0.1)
    optimizer = SAM(params, SGD, rho=schedule, lr=0.1, backend=backend)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    found = []
    for _ in range(3):
        found += radii(optimizer, params, 1)
        scheduler.step()
    assert found == pytest.approx([0.4, 0.3, 0.25])


def test_proportional_stays_between_its_ends() -> None:
    schedule = ProportionalToLR(0.4, 0.2, lr_high=0.1, lr_low=0.05)
    found = [schedule.at_learning_rate(lr) for lr in (0.0, 0.05, 0.075, 0.1, 1.0)]
    assert found == pytest.approx([0.2, 0.2, 0.3, 0.4, 0.4])
    assert ProportionalToLR(0.4, lr_high=0.1, low=0.0, lr_low=0.1).at_learning_rate(0.1) == 0.4


def test_groups_have_schedules_of_their_own(backend: str) -> None:
    params = parameters("unaligned", torch.float64)
    groups = [
        {"params": params[:2], "rho": lambda step: float(step)},
        {"params": params[2:], "rho": 0.5},
    ]
    optimizer = SAM(groups, SGD, rho=InverseSqrt(1.0), lr=0.1, backend=backend)
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(2).double())]})
    for number in range(3):
        step(optimizer, params, number)
    found = [group["rho"] for group in optimizer.param_groups]
    assert found == pytest.approx([3.0, 0.5, 3**-0.5])


def test_both_radii_of_bsam(backend: str) -> None:
    params = parameters("unaligned", torch.float64)
    optimizer = BSAM(
        params,
        SGD,
        rho=InverseSqrt(0.3),
        rho_min=ProportionalToLR(0.2, 0.0, lr_high=0.1),
        lr=0.1,
        backend=backend,
    )
    optimizer.param_groups[0]["lr"] = 0.05
    step(optimizer, params, 0)
    step(optimizer, params, 1)
    assert optimizer.param_groups[0]["rho"] == pytest.approx(0.3 / 2**0.5)
    assert optimizer.param_groups[0]["rho_min"] == pytest.approx(0.1)


@pytest.mark.parametrize("form", ["checkpoint", "pickle"])
def test_they_go_on_where_they_ended(form: str, backend: str) -> None:
    def make() -> tuple[Any, list[torch.nn.Parameter]]:
        torch.manual_seed(1)
        params = parameters("unaligned", torch.float64)
        options = {"rho": InverseSqrt(0.5), "every": 2, "backend": backend}
        return SAM(params, BASES["adamw"], **options), params

    whole, expected = make()
    for number in range(8):
        step_whole(whole, expected, number)
    first, params = make()
    for number in range(5):
        step_whole(first, params, number)
    if form == "checkpoint":
        second, others = make()
        with torch.no_grad():
            torch._foreach_copy_(others, params)
        second.load_state_dict(copy.deepcopy(first.state_dict()))
        params = others
    else:
        second, params = copy.deepcopy((first, params))
    for number in range(5, 8):
        step_whole(second, params, number)
    assert second.param_groups[0]["rho"] == pytest.approx(0.5 / 8**0.5)
    assert all(torch.equal(a, b) for a, b in zip(params, expected, strict=True))


def step_whole(optimizer: Any, params: list[torch.nn.Parameter], number: int) -> None:
    """One step call by call, sharpness-aware or plain."""
    set_gradients(params, 2 * number)
    optimizer.first_step(zero_grad=True)
    if optimizer.is_perturbed:
        set_gradients(params, 2 * number + 1)
        optimizer.second_step(zero_grad=True)


@pytest.mark.parametrize("method", ["sam", "wsam", "gsam", "bsam"])
def test_plain_steps_are_those_of_the_base_optimizer(method: str, backend: str) -> None:
    params = parameters("unaligned", torch.float64)
    others = [torch.nn.Parameter(param.detach().clone()) for param in params]
    optimizer = METHODS[method](params, BASES["adamw"], every=3, backend=backend)
    plain = BASES["adamw"](others)
    calls = 0

    def closure() -> torch.Tensor:
        nonlocal calls
        calls += 1
        optimizer.zero_grad()
        set_gradients(params, 7)
        return torch.ones(())

    for number in range(1, 7):
        calls = 0
        assert optimizer.is_plain_step == (number % 3 != 0)
        optimizer.step(closure)
        assert calls == (optimizer.evaluations if number % 3 == 0 else 1)
        assert (optimizer.last.perturbed_loss is None) == (number % 3 != 0)
        set_gradients(others, 7)
        plain.step()
        if number < 3:
            for param, expected in zip(params, others, strict=True):
                torch.testing.assert_close(param, expected, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("method", ["sam", "wsam", "gsam"])
def test_a_plain_step_with_a_gradient_that_is_not_finite_is_skipped(
    method: str, backend: str
) -> None:
    params = parameters("unaligned", torch.float64)
    optimizer = METHODS[method](params, BASES["adamw"], every=3, backend=backend)
    set_gradients(params, 0)
    optimizer.first_step(zero_grad=True)
    assert optimizer.last.grad_norm is not None
    before = [param.detach().clone() for param in params]
    set_gradients(params, 1)
    assert params[0].grad is not None
    params[0].grad.view(-1)[3] = float("nan")
    optimizer.first_step(zero_grad=True)
    assert all(torch.equal(param, w) for param, w in zip(params, before, strict=True))
    assert optimizer.skipped_steps == 1
    assert {float(entry["step"]) for entry in optimizer.state.values()} == {1.0}


def test_a_group_that_is_added_later_counts_with_the_others(backend: str) -> None:
    params = parameters("unaligned", torch.float64)
    optimizer = SAM(params[:2], SGD, rho=InverseSqrt(0.5), lr=0.1, backend=backend)
    for number in range(3):
        step(optimizer, params[:2], number)
    optimizer.add_param_group({"params": params[2:]})
    assert [group["rho"] for group in optimizer.param_groups][1] == 0.25
    set_gradients(params, 3)
    optimizer.first_step(zero_grad=True)
    assert [group["rho"] for group in optimizer.param_groups] == [0.25, 0.25]


def test_plain_steps_call_by_call_end_with_the_first_call(backend: str) -> None:
    params = parameters("unaligned", torch.float64)
    optimizer = WSAM(params, BASES["sgd"], every=2, backend=backend)
    set_gradients(params, 0)
    kept = [param.grad for param in params]
    optimizer.first_step()
    assert not optimizer.is_perturbed
    assert all(param.grad is grad for param, grad in zip(params, kept, strict=True))
    with pytest.raises(RuntimeError, match="nothing is pending"):
        optimizer.step()
    optimizer.first_step()
    assert optimizer.is_perturbed
    optimizer.restore()
    assert not optimizer.is_plain_step  # a step that was given up is still to be made


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"every": 0}, ValueError, "every is 0, expected a whole number >= 1"),
        ({"every": 1.5}, TypeError, "every is 1.5, expected a whole number >= 1"),
        ({"rho": lambda step: -1.0}, ValueError, r"rho at step 1 is -1.0, expected a number >= 0"),
        ({"rho": lambda step: "x"}, TypeError, r"rho at step 1 is 'x', expected a number >= 0"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SAM(parameters("unaligned", torch.float64), SGD, lr=0.1, **arguments)


def test_bad_ranges() -> None:
    with pytest.raises(ValueError, match=r"low is 0.5, expected a number in \[0, 0.4\]"):
        ProportionalToLR(0.4, 0.5, lr_high=0.1)
    with pytest.raises(ValueError, match=r"lr_low is 0.2, expected a number in \[0, 0.1\]"):
        ProportionalToLR(0.4, 0.2, lr_high=0.1, lr_low=0.2)
    with pytest.raises(ValueError, match=r"rho is -1\.0"):
        InverseSqrt(-1.0)


def test_a_schedule_that_fails_later_leaves_everything_as_it_was(backend: str) -> None:
    params = parameters("unaligned", torch.float64)
    optimizer = SAM(params, SGD, rho=lambda step: 2.5 - step, lr=0.1, backend=backend)
    step(optimizer, params, 0)
    step(optimizer, params, 1)
    before = [param.detach().clone() for param in params]
    set_gradients(params, 2)
    with pytest.raises(ValueError, match=r"rho at step 3 is -0.5, expected a number >= 0"):
        optimizer.first_step(zero_grad=True)
    assert not optimizer.is_perturbed
    assert all(torch.equal(param, w) for param, w in zip(params, before, strict=True))
    assert all(param.grad is not None for param in params)


def test_proportional_to_a_learning_rate_that_only_a_device_knows_is_refused() -> None:
    params = parameters("unaligned", torch.float64)
    schedule = ProportionalToLR(0.4, 0.2, lr_high=0.1)
    optimizer = SAM(params, SGD, rho=schedule, lr=0.1)
    optimizer.param_groups[0]["lr"] = torch.tensor(0.1, device="meta")
    set_gradients(params, 0)
    with pytest.raises(TypeError, match="rho is proportional to lr, which is a tensor on meta"):
        optimizer.first_step()
