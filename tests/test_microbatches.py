"""m-SAM: a step over micro-batches, against the same formulas in plain torch."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import BASES, FOREIGN_BASES
from cases import METHODS as ALL_METHODS
from differences import note_step
from tolerances import ONE_STEP, close
from torch import Tensor

from wsam_fused import BSAM, SAM

ALL_BASES = {**BASES, **FOREIGN_BASES}
METHODS = ["sam", "wsam", "coupled", "gsam", "gnp"]
F64 = torch.float64
RHO = 0.3


class Problem:
    """Three micro-batches for a small model; the last of them does not reach all parameters."""

    def __init__(self, dtype: torch.dtype = F64) -> None:
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(
            torch.nn.Linear(3, 5), torch.nn.Tanh(), torch.nn.Linear(5, 2)
        )
        self.net.to(dtype)
        self.params = list(self.net.parameters())
        self.x = torch.randn(3, 4, 3, dtype=dtype)
        self.y = torch.randn(3, 4, 2, dtype=dtype)

    def loss(self, part: int) -> Tensor:
        return torch.nn.functional.mse_loss(self.net(self.x[part]), self.y[part])

    def closures(self, parts: range = range(3)) -> list[Callable[[], Tensor]]:
        return [functools.partial(self._evaluate, part) for part in parts]

    def _evaluate(self, part: int) -> Tensor:
        loss = self.loss(part)
        loss.backward()
        return loss

    def gradients(self, part: int, moves: list[Tensor] | None = None) -> list[Tensor]:
        """Gradients at w, or somewhere else."""
        if moves is None:
            return list(torch.autograd.grad(self.loss(part), self.params))
        saved = [param.detach().clone() for param in self.params]
        with torch.no_grad():
            torch._foreach_add_(self.params, moves)
        found = self.gradients(part)
        with torch.no_grad():
            torch._foreach_copy_(self.params, saved)
        return found


def norm(tensors: list[Tensor]) -> Tensor:
    return torch.stack([(tensor * tensor).sum() for tensor in tensors]).sum().sqrt()


def mean(lists: list[list[Tensor]]) -> list[Tensor]:
    return [torch.stack(tensors).mean(0) for tensors in zip(*lists, strict=True)]


def expected_step(problem: Problem, method: str, base: Any, maximize: bool) -> None:
    """The step in plain torch, from the papers' formulas, with the base optimizer itself."""
    first, second, combined = [], [], []
    for part in range(3):
        g1 = problem.gradients(part)
        radius = (-RHO if maximize else RHO) / (norm(g1) + 1e-12)
        g2 = problem.gradients(part, [radius * g for g in g1])
        first.append(g1)
        second.append(g2)
        dot = torch.stack([(a * b).sum() for a, b in zip(g1, g2, strict=True)]).sum()
        cosine = dot / (norm(g1) * norm(g2) + 1e-12)
        weight = 1 + 0.4 * cosine * norm(g1) / (norm(g2) + 1e-12)
        combined.append([weight * b - 0.4 * a for a, b in zip(g1, g2, strict=True)])
    g1, g2 = mean(first), mean(second)
    h = {
        "sam": g2,
        "wsam": g1,
        "coupled": [-3 * a + 4 * b for a, b in zip(g1, g2, strict=True)],
        "gsam": mean(combined),
        "gnp": [0.2 * a + 0.8 * b for a, b in zip(g1, g2, strict=True)],
    }[method]
    for param, grad in zip(problem.params, h, strict=True):
        param.grad = grad
    base.step()
    if method == "wsam":
        lr = base.param_groups[0]["lr"] * (-1 if maximize else 1)
        with torch.no_grad():
            for param, a, b in zip(problem.params, g1, g2, strict=True):
                param -= lr * 9 * (b - a)


@pytest.mark.parametrize("base", ["sgdm", "sgdm-maximize", "adamw", "amsgrad", "rmsprop-maximize"])
@pytest.mark.parametrize("method", METHODS)
def test_it_is_the_mean_over_micro_batches(method: str, base: str, backend: str) -> None:
    ours, theirs = Problem(), Problem()
    optimizer = ALL_METHODS[method](ours.params, ALL_BASES[base], rho=RHO, backend=backend)
    plain = ALL_BASES[base](theirs.params)
    for _ in range(3):
        with torch.no_grad():
            expected_loss = torch.stack([theirs.loss(part) for part in range(3)]).mean()
        loss = optimizer.step(ours.closures())
        expected_step(theirs, method, plain, "maximize" in base)
        torch.testing.assert_close(loss, expected_loss, rtol=1e-11, atol=0.0)
        note_step(optimizer, ours.params, theirs.params, form=", micro-batches")
        for param, expected in zip(ours.params, theirs.params, strict=True):
            torch.testing.assert_close(param, expected, rtol=1e-10, atol=1e-12)
    assert all(param.grad is None for param in ours.params)
    assert not optimizer.is_perturbed


@pytest.mark.parametrize("options", [{}, {"adaptive": True}, {"geometry": "fisher"}])
@pytest.mark.parametrize("method", METHODS)
def test_one_micro_batch_is_an_ordinary_step(
    method: str, options: dict[str, Any], backend: str
) -> None:
    problems = [Problem(), Problem()]
    for problem, as_list in zip(problems, (True, False), strict=True):
        optimizer = ALL_METHODS[method](
            problem.params, BASES["adamw"], rho=RHO, backend=backend, **options
        )
        for _ in range(3):
            (closure,) = problem.closures(range(1))
            if as_list:
                optimizer.step([closure])
            else:
                optimizer.zero_grad()
                optimizer.step(functools.partial(clearing, optimizer, closure))
    for one, other in zip(problems[0].params, problems[1].params, strict=True):
        close(one.detach(), other.detach(), ONE_STEP[F64], method)


def clearing(optimizer: Any, closure: Callable[[], Tensor]) -> Tensor:
    optimizer.zero_grad()
    return closure()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_low_precision_and_the_reference_agree(method: str, dtype: torch.dtype) -> None:
    """bfloat16 sums are rounded at every micro-batch, on every backend alike."""
    results = []
    for backend in ("cuda-emulated", "eager"):
        problem = Problem(dtype)
        optimizer = ALL_METHODS[method](problem.params, BASES["sgd"], rho=RHO, backend=backend)
        optimizer.step(problem.closures())
        results.append([param.detach() for param in problem.params])
    for one, other in zip(*results, strict=True):
        close(one, other, ONE_STEP[dtype], method)


@pytest.mark.parametrize("method", METHODS)
def test_plain_steps_take_the_mean_too(method: str, backend: str) -> None:
    ours, theirs = Problem(), Problem()
    optimizer = ALL_METHODS[method](ours.params, BASES["sgdm"], every=2, backend=backend)
    plain = BASES["sgdm"](theirs.params)
    optimizer.step(ours.closures())
    for param, grad in zip(
        theirs.params, mean([theirs.gradients(part) for part in range(3)]), strict=True
    ):
        param.grad = grad
    plain.step()
    for param, expected in zip(ours.params, theirs.params, strict=True):
        torch.testing.assert_close(param, expected, rtol=1e-12, atol=1e-14)
    assert optimizer.last.perturbed_loss is None


@pytest.mark.parametrize("method", METHODS)
def test_clipping_clips_the_mean_gradients(method: str, backend: str) -> None:
    problem = Problem()
    before = [param.detach().clone() for param in problem.params]
    optimizer = ALL_METHODS[method](
        problem.params,
        functools.partial(torch.optim.SGD, lr=1.0),
        rho=RHO,
        max_grad_norm=1e-3,
        backend=backend,
    )
    optimizer.step(problem.closures())
    moved = norm([p - w for p, w in zip(problem.params, before, strict=True)]).item()
    # Of gradients of norm 1e-3 at most: g2; g1 and 9 (g2 - g1); -3 g1 + 4 g2; h; 0.2 g1 + 0.8 g2.
    most = {"sam": 1, "wsam": 19, "coupled": 7, "gsam": 1, "gnp": 1}[method]
    assert 0 < moved <= 1e-3 * most


@pytest.mark.parametrize("method", METHODS)
def test_a_shorter_micro_batch_may_be_weighed_by_its_loss(method: str, backend: str) -> None:
    """As the docstring says: the loss times its size over the mean size."""
    whole = Problem()
    weights = [1.5, 1.0, 0.5]

    def closure_of(part: int) -> Callable[[], Tensor]:
        def closure() -> Tensor:
            loss = weights[part] * whole.loss(part)
            loss.backward()
            return loss

        return closure

    expected = torch.stack([w * whole.loss(part).detach() for part, w in enumerate(weights)]).mean()
    optimizer = ALL_METHODS[method](whole.params, BASES["sgd"], rho=RHO, backend=backend)
    loss = optimizer.step([closure_of(part) for part in range(3)])
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("evaluation", range(1, 7))
@pytest.mark.parametrize("method", ["sam", "wsam", "gsam"])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_restores_everything(
    error: type[BaseException], method: str, evaluation: int, backend: str
) -> None:
    problem = Problem()
    optimizer = ALL_METHODS[method](
        problem.params, BASES["adamw"], rho=RHO, restore="backup", backend=backend
    )
    optimizer.step(problem.closures())
    before = copy.deepcopy([*problem.params, optimizer.state_dict()])
    calls = 0

    def failing(closure: Callable[[], Tensor]) -> Tensor:
        nonlocal calls
        calls += 1
        loss = closure()
        if calls == evaluation:
            raise error("boom")
        return loss

    with pytest.raises(error, match="boom"):
        optimizer.step([functools.partial(failing, closure) for closure in problem.closures()])
    assert calls == evaluation
    assert not optimizer.is_perturbed
    assert all(torch.equal(p, w) for p, w in zip(problem.params, before, strict=False))
    after = optimizer.state_dict()
    assert after["param_groups"] == before[-1]["param_groups"]
    for index, state in after["state"].items():
        for key, value in state.items():
            assert torch.equal(value, before[-1]["state"][index][key])
    assert all(param.grad is None for param in problem.params), "no sum of some is left behind"
    assert all(not param._post_accumulate_grad_hooks for param in problem.params)
    optimizer.step(problem.closures())
    assert not torch.equal(problem.params[0], before[0])


@pytest.mark.parametrize("evaluation", range(1, 7))
@pytest.mark.parametrize("method", ["sam", "wsam", "gsam"])
def test_a_gradient_that_is_not_finite_skips_the_step(
    method: str, evaluation: int, backend: str
) -> None:
    problem = Problem()
    optimizer = ALL_METHODS[method](
        problem.params, BASES["adamw"], rho=RHO, restore="backup", backend=backend
    )
    optimizer.step(problem.closures())
    before = [param.detach().clone() for param in problem.params]
    calls = 0

    def spoiled(part: int) -> Tensor:
        nonlocal calls
        calls += 1
        loss = problem.loss(part) * (float("nan") if calls == evaluation else 1.0)
        loss.backward()
        return loss

    optimizer.step([functools.partial(spoiled, part) for part in range(3)])
    assert all(torch.equal(p, w) for p, w in zip(problem.params, before, strict=True))
    assert optimizer.skipped_steps == 1


def test_a_parameter_without_gradients_is_left_alone(backend: str) -> None:
    for method in METHODS:
        problem = Problem()
        unused = torch.nn.Parameter(torch.ones(3, dtype=F64))
        optimizer = ALL_METHODS[method](
            [*problem.params, unused], BASES["adamw"], rho=RHO, backend=backend
        )
        optimizer.step(problem.closures())
        assert torch.equal(unused, torch.ones(3, dtype=F64))


def test_a_parameter_that_some_micro_batches_use_gets_its_share(backend: str) -> None:
    for method in METHODS:
        a, b = (torch.nn.Parameter(torch.ones(1, dtype=F64)) for _ in range(2))

        def use(*params: Tensor) -> Tensor:
            loss = torch.stack([2 * param.sum() for param in params]).sum()
            loss.backward()
            return loss

        optimizer = ALL_METHODS[method](
            [a, b], functools.partial(torch.optim.SGD, lr=0.3), rho=RHO, backend=backend
        )
        optimizer.step([functools.partial(use, a), functools.partial(use, a, b)])
        # Gradients are 2 wherever there is one, h is 2 for all methods but GSAM.
        if method != "gsam":
            assert a.item() == pytest.approx(1 - 0.3 * 2)
            assert b.item() == pytest.approx(1 - 0.3 * 1)
        else:
            assert 1 - 0.3 * 2 - 1e-9 < a.item() < b.item() < 1


def test_batch_norm_sees_every_micro_batch_once(backend: str) -> None:
    norm_layer = torch.nn.BatchNorm1d(3).double()
    x = torch.randn(2, 6, 3, dtype=F64)
    optimizer = SAM(
        norm_layer.parameters(), BASES["sgd"], rho=5.0, backend=backend, model=norm_layer
    )

    def evaluate(part: int) -> Tensor:
        loss = norm_layer(x[part]).pow(3).sum()
        loss.backward()
        return loss

    optimizer.step([functools.partial(evaluate, part) for part in range(2)])
    assert norm_layer.num_batches_tracked == 2


def test_bad_closures() -> None:
    problem = Problem()
    optimizer = SAM(problem.params, BASES["sgd"])
    with pytest.raises(ValueError, match=r"step\(\) was given an empty list, expected a closure"):
        optimizer.step([])
    with pytest.raises(TypeError, match=r"step\(\) was given 3 in a list, expected closures only"):
        optimizer.step([problem.closures()[0], 3])  # type: ignore[list-item]
    other = BSAM(problem.params, BASES["sgd"])
    with pytest.raises(TypeError, match="a list of closures, which BSAM does not take"):
        other.step(problem.closures())


def test_telemetry(backend: str) -> None:
    for method in METHODS:
        problem = Problem()
        optimizer = ALL_METHODS[method](problem.params, BASES["sgd"], rho=RHO, backend=backend)
        loss = optimizer.step(problem.closures())
        assert torch.equal(optimizer.last.loss, loss)
        assert optimizer.last.sharpness > 0
        # Norms are told only where they are those of mean gradients.
        if method in ("sam", "gsam"):
            assert optimizer.last.grad_norm is optimizer.last.cosine is None
        else:
            twin = Problem()
            expected = norm(mean([twin.gradients(part) for part in range(3)]))
            torch.testing.assert_close(optimizer.last.grad_norm, expected)


# ---- what closures may do with memory ------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_gradients_of_another_dtype(method: str, backend: str) -> None:
    """Sums have the dtype of the parameters, and `grad_dtype` stays as it was."""
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        problem = Problem(torch.float32)
        for param in problem.params:
            param.grad_dtype = dtype
        optimizer = ALL_METHODS[method](problem.params, BASES["sgd"], rho=RHO, backend=backend)
        optimizer.step(problem.closures())
        assert {param.grad_dtype for param in problem.params} == {dtype}
        results.append(torch.cat([param.detach().flatten() for param in problem.params]))
    start = torch.cat([param.detach().flatten() for param in Problem(torch.float32).params])
    torch.testing.assert_close(results[1] - start, results[0] - start, rtol=0.05, atol=5e-3)
    assert not torch.equal(*results)


@pytest.mark.parametrize("method", METHODS)
def test_a_parameter_that_moves_while_it_is_perturbed(method: str, backend: str) -> None:
    problem, twin = Problem(), Problem()
    optimizers = [
        ALL_METHODS[method](one.params, BASES["sgdm"], rho=RHO, backend=backend)
        for one in (problem, twin)
    ]
    calls = 0

    def moving(closure: Callable[[], Tensor]) -> Tensor:
        nonlocal calls
        calls += 1
        if calls % 2 == 0:  # at the ascent point
            problem.params[0].data = problem.params[0].data.clone()
        return closure()

    optimizers[0].step([functools.partial(moving, each) for each in problem.closures()])
    optimizers[1].step(twin.closures())
    for ours, expected in zip(problem.params, twin.params, strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("method", METHODS)
def test_gradients_that_closures_write_over_those_in_use_are_an_error(
    method: str, backend: str
) -> None:
    problem = Problem()
    before = [param.detach().clone() for param in problem.params]
    kept = [torch.ones_like(param) for param in problem.params]
    optimizer = ALL_METHODS[method](
        problem.params, BASES["sgd"], rho=RHO, restore="backup", backend=backend
    )

    def closure() -> Tensor:
        for param, grad in zip(problem.params, kept, strict=True):
            param.grad = grad.fill_(1.0)
        return torch.ones(())

    with pytest.raises(RuntimeError, match=r"over one that is still in use|over the first one"):
        optimizer.step([closure, closure])
    if method != "sam":  # a copy of w takes the memory of g1, which the closure has spoilt
        assert all(torch.equal(p, w) for p, w in zip(problem.params, before, strict=True))
    assert not optimizer.is_perturbed


def test_a_gradient_at_the_ascent_point_only_does_not_count(backend: str) -> None:
    """As in a step with one closure."""
    problem = Problem()
    last = problem.params[-1]
    before = last.detach().clone()
    calls = 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        loss = problem.loss(0)
        loss.backward()
        if calls % 2 == 1:
            last.grad = None
        return loss

    optimizer = SAM(problem.params, BASES["sgd"], rho=RHO, backend=backend)
    optimizer.step([closure, closure])
    assert torch.equal(last, before)
    assert not torch.equal(problem.params[0], Problem().params[0])
