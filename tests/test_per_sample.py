"""ESAM and RW-SAM: what their steps on every backend have in common."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import BASES, FOREIGN_BASES, parameters
from comparison import compare_and_align
from conftest import ON_CPU
from per_sample_cases import METHODS, OPTIONS, Linear, Net, vector
from tolerances import ONE_STEP, close
from torch import Tensor

from wsam_fused import ESAM, RWSAM, SAM

ALL_BASES = {**BASES, **FOREIGN_BASES}
EACH = pytest.mark.parametrize("method", METHODS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("base", ["sgd-l2", "sgdm", "nesterov", "adam", "adamw", "rmsprop"])
@EACH
@pytest.mark.parametrize("backend", [name for name in ON_CPU if name != "eager"])
def test_backends_agree_with_the_reference(
    backend: str, method: str, base: str, option: str, dtype: torch.dtype
) -> None:
    optimizers, losses = [], []
    for name in (backend, "eager"):
        torch.manual_seed(1)
        params = parameters("unaligned", dtype)
        losses.append(Linear(params))
        optimizers.append(METHODS[method](params, ALL_BASES[base], backend=name, **OPTIONS[option]))
    before = [param.detach().clone() for param in losses[0].params]
    for number in range(4):
        found = [one.step(each) for one, each in zip(optimizers, losses, strict=True)]
        close(*found, ONE_STEP[dtype], "loss")
        compare_and_align(*optimizers, dtype, f"step {number}")
    assert not any(torch.equal(p, w) for p, w in zip(losses[0].params, before, strict=True))


@EACH
def test_without_its_own_ingredient_it_is_sam(method: str, backend: str) -> None:
    neutral = {"esam": {"beta": 1.0, "gamma": 1.0}, "rwsam": {"lam": 0.0}}[method]
    nets = [Net(), Net()]
    nets[1].__dict__.update(copy.deepcopy(nets[0].__dict__))
    options = {"rho": 0.3, "backend": backend}
    ours = METHODS[method](nets[0].model.parameters(), BASES["adamw"], **neutral, **options)
    sam = SAM(nets[1].model.parameters(), BASES["adamw"], **options)

    def closure() -> Tensor:
        sam.zero_grad()
        loss = nets[1]().mean()
        loss.backward()
        return loss

    for _ in range(5):
        close(ours.step(nets[0]), sam.step(closure).detach(), ONE_STEP[torch.float64], "loss")
    for one, other in zip(nets[0].model.parameters(), nets[1].model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@EACH
def test_the_calls_say_what_to_call_instead(method: str) -> None:
    net = Net()
    optimizer = METHODS[method](net.model.parameters(), BASES["sgd"])
    for call in (optimizer.first_step, optimizer.second_step, optimizer.third_step):
        with pytest.raises(RuntimeError, match=rf"{call.__name__}\(\).* call step\(losses_fn\)"):
            call()
    for wrong in (None, [lambda: None], 3.0):
        with pytest.raises(TypeError, match=r"expected a function losses_fn\(index=None\)"):
            optimizer.step(wrong)


BAD: dict[str, tuple[Callable[[Tensor], Any], type[BaseException], str]] = {
    "scalar": (torch.mean, ValueError, r"the shape \[\], expected one loss per sample.*reduction"),
    "matrix": (lambda x: x[:, None], ValueError, r"the shape \[\d, 1\], expected one loss per"),
    "empty": (lambda x: x[:0], ValueError, r"the shape \[0\], expected one loss per sample"),
    "longer": (lambda x: torch.cat([x, x]), ValueError, r"returned \d+ losses for .*, expected \d"),
    "no tensor": (lambda x: x.tolist(), TypeError, "returned list, expected one loss per sample"),
    "integers": (lambda x: x.long(), TypeError, "a tensor of torch.int64, expected one loss"),
    "no graph": (torch.Tensor.detach, ValueError, "a tensor without graph"),
}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("evaluation", [1, 2, 3])
@EACH
def test_bad_losses_are_refused_and_nothing_is_lost(
    method: str, evaluation: int, bad: str, backend: str
) -> None:
    spoil, error, message = BAD[bad]
    net = Net()
    if bad == "longer" and evaluation == 1:
        if method == "esam":
            pytest.skip("the first evaluation says how many samples there are")
        evaluation = 2
    if bad == "no graph" and evaluation == (2 if method == "esam" else 1):
        pytest.skip("that evaluation needs no graph")
    if bad == "no graph" and method == "esam" and evaluation == 1:
        pytest.skip("ESAM tries again with all tensors: see below")
    check_failure(net, method, backend, evaluation, spoil, error, message)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("evaluation", [1, 2, 3])
@EACH
def test_an_exception_restores_everything(
    method: str, evaluation: int, error: type[BaseException], backend: str
) -> None:
    def spoil(losses: Tensor) -> Any:
        raise error("boom")

    check_failure(Net(), method, backend, evaluation, spoil, error, "boom")


def check_failure(
    net: Net,
    method: str,
    backend: str,
    evaluation: int,
    spoil: Callable[[Tensor], Any],
    error: type[BaseException],
    message: str,
) -> None:
    params = list(net.model.parameters())
    optimizer = METHODS[method](
        params, BASES["adamw"], rho=0.3, restore="backup", backend=backend, model=net.model
    )
    optimizer.step(net)
    before = copy.deepcopy([*params, optimizer.state_dict()])
    calls = 0

    def losses_fn(index: Tensor | None = None) -> Any:
        nonlocal calls
        calls += 1
        return spoil(net(index)) if calls == evaluation else net(index)

    with pytest.raises(error, match=message):
        optimizer.step(losses_fn)
    assert calls == evaluation
    assert not optimizer.is_perturbed
    assert all(param.requires_grad for param in params)
    assert all(torch.equal(p, w) for p, w in zip(params, before, strict=False))
    after = optimizer.state_dict()
    assert after["param_groups"] == before[-1]["param_groups"]
    for index, state in after["state"].items():
        for key, value in state.items():
            assert torch.equal(value, before[-1]["state"][index][key])
    optimizer.step(net)
    assert not torch.equal(params[0], before[0])


@EACH
def test_batch_norm_sees_the_unperturbed_batch_once(method: str, backend: str) -> None:
    net = Net()
    optimizer = METHODS[method](
        net.model.parameters(), BASES["sgd"], rho=5.0, backend=backend, model=net.model
    )
    norm = net.model[1]
    expected = 0.9 * norm.running_mean + 0.1 * net.model[0](net.x).mean(0).detach()
    optimizer.step(net)
    torch.testing.assert_close(norm.running_mean, expected)
    assert norm.num_batches_tracked == 1


@EACH
def test_a_checkpoint_goes_on_with_the_same_choices(method: str, backend: str) -> None:
    def train(steps: int, seed: int, saved: Any = None) -> tuple[Any, list[Tensor]]:
        torch.manual_seed(3)
        net = Net()
        options = {"rho": 0.3, "seed": seed, "backend": backend}
        optimizer = METHODS[method](net.model.parameters(), BASES["adamw"], **options)
        if saved is not None:
            net.model.load_state_dict(saved[0])
            optimizer.load_state_dict(saved[1])
        for _ in range(steps):
            optimizer.step(net)
        state = copy.deepcopy([net.model.state_dict(), optimizer.state_dict()])
        return state, [param.detach() for param in net.model.parameters()]

    whole = train(6, seed=5)[1]
    resumed = train(3, seed=5, saved=train(3, seed=5)[0])[1]
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))
    other = train(6, seed=6)[1]
    assert not any(torch.equal(a, b) for a, b in zip(whole, other, strict=True))


@EACH
def test_plain_steps_between(method: str, backend: str) -> None:
    params = parameters("unaligned", torch.float64)
    losses = Linear(params)
    optimizer = METHODS[method](params, BASES["sgd"], every=3, backend=backend)
    evaluations = []
    for _ in range(6):
        losses.calls.clear()
        optimizer.step(losses)
        evaluations.append(len(losses.calls))
        assert (optimizer.last.perturbed_loss is None) == (evaluations[-1] == 1)
    assert evaluations == [1, 1, 3, 1, 1, 3]


@EACH
def test_telemetry(method: str, backend: str) -> None:
    params = parameters("unaligned", torch.float64)
    losses = Linear(params)
    expected = losses().mean().item()
    optimizer = METHODS[method](params, BASES["sgd"], rho=0.5, backend=backend)
    assert optimizer.step(losses).item() == pytest.approx(expected)
    assert optimizer.last.loss.item() == pytest.approx(expected)
    assert optimizer.last.grad_norm > 0
    assert optimizer.last.second_grad_norm is None
    if method == "esam":  # along the gradient of the mean loss: rho / beta |g1|
        risen = 0.5 / 0.6 * optimizer.last.grad_norm.item()
        assert optimizer.last.sharpness.item() == pytest.approx(risen)


@pytest.mark.parametrize(
    ("method", "arguments", "error", "message"),
    [
        (ESAM, {"beta": 0.0}, ValueError, r"beta is 0.0, expected a number in \(0, 1\]"),
        (ESAM, {"beta": 1.1}, ValueError, r"beta is 1.1, expected a number in \(0, 1\]"),
        (ESAM, {"gamma": 0.0}, ValueError, r"gamma is 0.0, expected a number in \(0, 1\]"),
        (ESAM, {"gamma": 2}, ValueError, r"gamma is 2.0, expected a number in \(0, 1\]"),
        (ESAM, {"seed": -1}, ValueError, r"seed is -1, expected a whole number >= 0"),
        (ESAM, {"seed": 0.5}, TypeError, r"seed is 0.5, expected a whole number >= 0"),
        (ESAM, {"maximize": True}, ValueError, "maximize is True.*negate the losses"),
        (ESAM, {"only_weights": True}, ValueError, "needs the parameters' names"),
        (RWSAM, {"lam": -1.0}, ValueError, r"lam is -1.0, expected a number >= 0"),
        (RWSAM, {"delta": 0.0}, ValueError, r"delta is 0.0, expected a number > 0"),
        (RWSAM, {"delta": float("nan")}, ValueError, r"delta is nan, expected a number > 0"),
    ],
)
def test_bad_arguments(
    method: Any, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        method([vector(1.0)], torch.optim.SGD, lr=0.1, **arguments)
