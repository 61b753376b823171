"""A step from gradients that are there already is the step with a closure, bit for bit."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from by_hand import assert_same, network, samples, state_of
from cases import BASES, FOREIGN_BASES, METHODS
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from wsam_fused import ESAM, RWSAM, SAM, WSAM

STEPS = 4


class Run:
    """A model, its optimizer, and evaluations that can be counted."""

    def __init__(self, method: Any = WSAM, base: Any = torch.optim.AdamW, **options: Any) -> None:
        self.model: nn.Module = network()
        self.optimizer: Any = method(self.model.parameters(), base, **{"rho": 0.3, **options})
        self.calls = 0

    def evaluate(self) -> Tensor:
        """Compute gradients without clearing any."""
        self.calls += 1
        x, y = samples()
        loss = mse_loss(self.model(x), y)
        loss.backward()
        return loss

    def again(self) -> Tensor:
        assert all(p.grad is None for p in self.model.parameters())
        assert torch.is_grad_enabled()
        return self.evaluate()

    def closure(self) -> Tensor:
        self.optimizer.zero_grad()
        return self.evaluate()

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.evaluate()
        assert self.optimizer.step() is None


@pytest.mark.parametrize("base", ["sgdm", "adamw", "rmsprop"])
@pytest.mark.parametrize("method", list(METHODS))
def test_it_is_the_step_with_a_closure(method: str, base: str, backend: str) -> None:
    bases = {**BASES, **FOREIGN_BASES}
    run, other = (Run(METHODS[method], bases[base], backend=backend) for _ in range(2))
    run.optimizer.second_evaluation = run.again
    for _ in range(STEPS):
        run.step()
        other.optimizer.step(other.closure)
    assert_same(run.model, other.model)
    assert run.calls == other.calls == STEPS * run.optimizer.evaluations
    last = run.optimizer.last
    assert last.loss is None
    assert torch.equal(last.perturbed_loss, other.optimizer.last.perturbed_loss)


def test_gradients_may_have_been_accumulated() -> None:
    run, other = Run(), Run()
    x, y = samples()
    parts = list(zip(x.chunk(4), y.chunk(4), strict=True))

    def evaluate() -> None:
        for part in parts:
            (mse_loss(run.model(part[0]), part[1]) / 4).backward()

    run.optimizer.second_evaluation = evaluate
    for _ in range(STEPS):
        run.optimizer.zero_grad()
        evaluate()
        run.optimizer.step()
        other.optimizer.step(other.closure)
    for found, wanted in zip(run.model.parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-13)


def test_plain_steps_do_without_it() -> None:
    run, other = Run(every=2), Run(every=2)
    run.optimizer.second_evaluation = run.again
    for _ in range(STEPS):
        run.step()
        other.optimizer.step(other.closure)
    assert_same(run.model, other.model)
    assert run.calls == STEPS + STEPS // 2


def test_a_closure_does_without_it() -> None:
    run = Run()
    run.optimizer.second_evaluation = run.again
    run.optimizer.step(run.closure)
    assert run.calls == 2


def test_a_step_that_first_step_began_is_completed() -> None:
    run = Run()
    run.optimizer.second_evaluation = run.again
    run.evaluate()
    run.optimizer.first_step(zero_grad=True)
    run.evaluate()
    run.optimizer.step()
    assert run.calls == 2
    assert not run.optimizer.is_perturbed


@pytest.mark.parametrize(("method", "failing"), [("wsam", 1), ("bsam", 1), ("bsam", 2)])
def test_an_exception_restores_the_weights(method: str, failing: int) -> None:
    run = Run(METHODS[method], restore="backup")
    before = state_of(run.model)

    def fails() -> None:
        assert run.optimizer.is_perturbed
        assert not torch.equal(run.model[0].weight, before["0.weight"])
        if run.calls == failing:
            raise KeyboardInterrupt
        run.evaluate()

    run.optimizer.second_evaluation = fails
    with pytest.raises(KeyboardInterrupt):
        run.step()
    assert not run.optimizer.is_perturbed
    assert all(torch.equal(value, before[name]) for name, value in run.model.state_dict().items())


def test_one_without_gradients_is_an_error_and_restores() -> None:
    run = Run(restore="backup")
    before = state_of(run.model)
    run.optimizer.second_evaluation = lambda: None
    with pytest.raises(RuntimeError, match=r"second_evaluation left no gradient .* backward\(\)"):
        run.step()
    assert not run.optimizer.is_perturbed
    assert all(torch.equal(value, before[name]) for name, value in run.model.state_dict().items())


def test_a_step_without_gradients_is_an_error() -> None:
    run = Run()
    run.optimizer.second_evaluation = run.again
    with pytest.raises(RuntimeError, match="none of the 4 parameters has a gradient"):
        run.optimizer.step()
    assert run.calls == 0


def test_what_it_may_be() -> None:
    optimizer = Run().optimizer
    assert optimizer.second_evaluation is None
    with pytest.raises(TypeError, match="second_evaluation is 3, expected a function without arg"):
        optimizer.second_evaluation = 3
    optimizer.second_evaluation = print
    optimizer.second_evaluation = None
    with pytest.raises(RuntimeError, match=r"or set second_evaluation. docs/use_with\.md says"):
        optimizer.step()


@pytest.mark.parametrize("method", [ESAM, RWSAM])
def test_methods_with_a_loss_for_every_sample_have_none(method: Any) -> None:
    optimizer = method(network().parameters(), torch.optim.SGD, lr=0.1)
    with pytest.raises(RuntimeError, match=r"has no second_evaluation; call step\(losses_fn\)"):
        optimizer.second_evaluation = print
    optimizer.second_evaluation = None


def test_it_is_not_saved_and_survives_loading() -> None:
    run = Run(SAM)
    run.optimizer.second_evaluation = run.again
    run.step()
    for other in (copy.deepcopy(run.optimizer), pickle.loads(pickle.dumps(run.optimizer))):
        assert other.second_evaluation is None
    state = run.optimizer.state_dict()
    assert "second_evaluation" not in str(state)
    run.optimizer.load_state_dict(state)
    run.step()
    assert run.calls == 4


def accumulate(run: Run) -> None:
    """Two backwards, and a closure that adds a third: what frameworks do for other optimizers."""
    run.optimizer.zero_grad()
    run.evaluate()
    run.evaluate()
    run.optimizer.step(run.evaluate)


def test_a_closure_after_accumulated_gradients_warns_once() -> None:
    run, other = Run(), Run()
    with pytest.warns(UserWarning, match="earlier micro-batches, they are lost"):
        accumulate(run)
    accumulate(run)
    for _ in range(2):
        other.optimizer.step(other.closure)
    assert_same(run.model, other.model)


def test_gradients_that_a_closure_clears_do_not_warn() -> None:
    run = Run()
    for _ in range(2):
        run.evaluate()
        run.optimizer.step(run.closure)
        run.optimizer.step(run.evaluate)  # what the step left is no sign either


def test_a_parameter_that_the_closure_does_not_use_keeps_none() -> None:
    run = Run(base=torch.optim.SGD, lr=0.1, weight_decay=0.1)
    unused = nn.Parameter(torch.ones(3))
    run.optimizer.param_groups[0]["params"].insert(0, unused)
    unused.grad = torch.ones(3)
    run.optimizer.step(run.evaluate)
    assert unused.grad is None
    assert torch.equal(unused, torch.ones(3))


# ---- no false alarms -----------------------------------------------------------------------------


@pytest.mark.parametrize("habit", ["in-place", "clip", "after a failure", "closure in place"])
def test_usual_loops_do_not_warn(habit: str) -> None:
    """A warning would be an error: closures that do not clear, and changes of what they left."""
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1)
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    fails = False

    def closure() -> torch.Tensor:
        if habit == "closure in place":
            optimizer.zero_grad(set_to_none=False)
        loss = model(torch.ones(4, 3)).square().mean()
        loss.backward()
        if fails:
            raise RuntimeError("out of memory")
        return loss

    if habit == "closure in place":
        closure()
    for number in range(3):
        fails = habit == "after a failure" and number == 1
        if fails:
            with pytest.raises(RuntimeError, match="out of memory"):
                optimizer.step(closure)
        else:
            optimizer.step(closure)
        if habit == "in-place":
            optimizer.zero_grad(set_to_none=False)
        elif habit == "clip":
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)


def test_updates_within_the_backward_go_with_it() -> None:
    results = []
    for in_backward in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 1).double()
        optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1)
        if in_backward:
            optimizer.update_in_backward()

        def evaluate(model: torch.nn.Module = model) -> None:
            model(torch.ones(4, 3, dtype=torch.float64)).square().mean().backward()

        optimizer.second_evaluation = evaluate
        for _ in range(3):
            optimizer.zero_grad()
            evaluate()
            optimizer.step()
        results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*results)
