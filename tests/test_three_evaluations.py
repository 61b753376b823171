"""BSAM: the third evaluation, call by call and with a closure, and what can go wrong with it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from cases import BASES, FOREIGN_BASES, call, parameters, set_gradients, step
from torch import Tensor
from torch.optim import SGD, AdamW

from wsam_fused import BSAM, SAM

ALL_BASES = {**BASES, **FOREIGN_BASES}


def make(backend: str, **options: Any) -> tuple[BSAM, list[torch.nn.Parameter]]:
    params = parameters("unaligned", torch.float64)
    options = {"rho": 0.3, "rho_min": 0.2, "restore": "backup", **options}
    return BSAM(params, BASES["adamw"], backend=backend, **options), params


def copies(params: list[torch.nn.Parameter]) -> list[Tensor]:
    return [param.detach().clone() for param in params]


def same(params: list[torch.nn.Parameter], before: list[Tensor]) -> bool:
    return all(torch.equal(param, w) for param, w in zip(params, before, strict=True))


@pytest.mark.parametrize("base", ["sgdm", "adamw", "rmsprop"])
@pytest.mark.parametrize("as_published", [False, True])
def test_closure_and_calls_are_the_same(base: str, as_published: bool, backend: str) -> None:
    results = []
    for form in ("closure", "calls", "step"):
        torch.manual_seed(1)
        model = torch.nn.Linear(3, 2).double()
        x = torch.randn(4, 3, dtype=torch.float64)
        optimizer = BSAM(
            model.parameters(), ALL_BASES[base], as_published=as_published, backend=backend
        )

        def closure(optimizer: Any = optimizer, model: Any = model, x: Tensor = x) -> Tensor:
            optimizer.zero_grad()
            loss = model(x).square().sum()
            loss.backward()
            return loss

        for _ in range(2):
            if form == "closure":
                optimizer.step(closure)
                continue
            for take in (optimizer.first_step, optimizer.second_step):
                closure()
                take(zero_grad=form == "calls")
            closure()
            optimizer.third_step() if form == "calls" else optimizer.step()
        results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_calls_in_the_wrong_order(backend: str) -> None:
    optimizer, params = make(backend)
    with pytest.raises(RuntimeError, match=r"third_step\(\) was called before second_step"):
        optimizer.third_step()
    set_gradients(params, 0)
    optimizer.first_step(zero_grad=True)
    with pytest.raises(RuntimeError, match=r"third_step\(\) was called before second_step"):
        optimizer.third_step()
    set_gradients(params, 1)
    optimizer.second_step(zero_grad=True)
    with pytest.raises(RuntimeError, match=r"second_step\(\) was called before first_step"):
        optimizer.second_step()
    set_gradients(params, 2)
    optimizer.third_step()
    assert not optimizer.is_perturbed
    other = SAM(params, SGD, lr=0.1)
    with pytest.raises(RuntimeError, match=r"third_step\(\) was called, but SAM has two"):
        other.third_step()


@pytest.mark.parametrize("evaluation", [1, 2, 3])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("as_published", [False, True])
def test_an_exception_restores_the_weights(
    as_published: bool, error: type[BaseException], evaluation: int, backend: str
) -> None:
    optimizer, params = make(backend, as_published=as_published)
    step(optimizer, params, 0)
    before, state = copies(params), copy.deepcopy(optimizer.state_dict())
    calls = 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        optimizer.zero_grad()
        set_gradients(params, calls)
        if calls == evaluation:
            raise error("boom")
        return torch.ones(())

    with pytest.raises(error, match="boom"):
        optimizer.step(closure)
    assert calls == evaluation
    assert not optimizer.is_perturbed
    assert same(params, before)
    after = optimizer.state_dict()
    assert after["param_groups"] == state["param_groups"]
    for index, entry in after["state"].items():
        assert all(torch.equal(entry[key], state["state"][index][key]) for key in entry)


@pytest.mark.parametrize("evaluation", [0, 1, 2])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_skips_the_step(
    value: float, evaluation: int, backend: str
) -> None:
    optimizer, params = make(backend)
    step(optimizer, params, 0)
    before = copies(params)
    for number in range(3):
        set_gradients(params, 7 + number)
        if number == evaluation:
            params[1].grad[3] = value  # type: ignore[index]
        call(optimizer, number)
    assert same(params, before)
    assert optimizer.skipped_steps == 1


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_a_parameter_that_lacks_a_gradient_is_restored_and_not_updated(
    missing: int, backend: str
) -> None:
    optimizer, params = make(backend)
    before = copies(params)
    for number in range(3):
        set_gradients(params, number)
        if number == missing:
            params[1].grad = None
        call(optimizer, number)
    assert torch.equal(params[1], before[1])
    assert not torch.equal(params[0], before[0])


@pytest.mark.parametrize("evaluation", [1, 2])
def test_a_wrong_gradient_is_refused_and_the_weights_are_restored(
    evaluation: int, backend: str
) -> None:
    optimizer, params = make(backend)
    before = copies(params)
    for number in range(evaluation):
        set_gradients(params, number)
        call(optimizer, number)
    set_gradients(params, evaluation)
    params[1].grad = torch.zeros_like(params[1]).to_sparse()
    with pytest.raises(TypeError, match="expected a dense"):
        call(optimizer, evaluation)
    assert not optimizer.is_perturbed
    assert same(params, before)


def test_a_third_gradient_of_zero_drops_out(backend: str) -> None:
    w = torch.nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))
    optimizer = BSAM([w], SGD, lr=0.1, backend=backend)
    for number, values in enumerate([(3.0, 4.0), (1.0, 2.0), (0.0, 0.0)]):
        w.grad = torch.tensor(values, dtype=torch.float64)
        call(optimizer, number)
    assert w.tolist() == pytest.approx([3 - 0.4, 4 - 0.6])


def test_batch_norm_sees_the_unperturbed_pass_only(backend: str) -> None:
    norm = torch.nn.BatchNorm1d(3).double()
    x = torch.randn(8, 3, dtype=torch.float64)
    optimizer = BSAM(norm.parameters(), SGD, rho=3.0, lr=0.1, backend=backend, model=norm)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = norm(x).pow(3).sum()
        loss.backward()
        return loss

    expected = 0.9 * norm.running_mean + 0.1 * x.mean(0)
    optimizer.step(closure)
    torch.testing.assert_close(norm.running_mean, expected)
    assert norm.num_batches_tracked == 1


def test_a_second_backward_that_adds_to_kept_gradients_does_not_touch_the_copies(
    backend: str,
) -> None:
    """``zero_grad=False`` copies; the three gradients then are what the user's loop makes them."""
    results = []
    for take in (True, False):
        torch.manual_seed(1)
        optimizer, params = make(backend)
        for number, call_ in enumerate(
            (optimizer.first_step, optimizer.second_step, optimizer.third_step)
        ):
            set_gradients(params, number)
            call_(zero_grad=take)
            if not take and number < 2:
                assert all(param.grad is not None for param in params)
                for param in params:
                    param.grad.zero_()  # type: ignore[union-attr]
        results.append(copies(params))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rho_min": -0.1}, r"rho_min is -0.1, expected a number >= 0"),
        ({"rho_min": float("nan")}, r"rho_min is nan, expected a number >= 0"),
        ({"rho_min": lambda step: -1.0}, r"rho_min at step 1 is -1.0, expected a number >= 0"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BSAM([torch.nn.Parameter(torch.zeros(3))], SGD, lr=0.1, **arguments)


def test_a_checkpoint_and_a_copy_keep_what_is_its_own(backend: str) -> None:
    optimizer, params = make(backend, as_published=True)
    step(optimizer, params, 0)
    other, others = copy.deepcopy((optimizer, params))
    for one, list_ in ((optimizer, params), (other, others)):
        step(one, list_, 1)
    assert all(torch.equal(a, b) for a, b in zip(params, others, strict=True))
    plain = AdamW(params, lr=0.1)
    plain.load_state_dict(optimizer.state_dict())
    assert plain.param_groups[0]["rho_min"] == 0.2
