"""Random sequences of public calls, beside a model of the optimizer.

After every call weights, gradients, states, counts and the phase are those of the model; a call in
the wrong order raises RuntimeError and changes nothing.
"""

from __future__ import annotations

import copy
import functools
import gc
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule, run_state_machine_as_test
from optimizer_and_model import OptimizerAndModel

seeds = st.integers(0, 2**20)


class Fault(Exception):
    """What a closure raises."""


class RandomCalls(OptimizerAndModel):
    """What is done to an optimizer and its model."""

    # Within a step that is updated in the backward this would be a part of the step.
    @precondition(lambda self: not (self.is_pending and self.handle))
    @rule(seed=seeds, mask=st.integers(1, 15))
    def backward(self, seed: int, mask: int) -> None:
        self._model_backward(seed, mask)
        loss = self._loss(seed, mask)
        if loss.requires_grad:
            loss.backward()  # type: ignore[no-untyped-call]

    @precondition(lambda self: not (self.is_pending and self.handle))
    @rule(
        seed=seeds,
        mask=st.sampled_from([15, 15, 7]),
        zero_grad=st.booleans(),
        rho=st.sampled_from([None, None, 0.01, 0.3]),
        count=st.integers(1, 3),
    )
    def go_on(self, seed: int, mask: int, zero_grad: bool, rho: float | None, count: int) -> None:
        """What comes next in a step: most random calls are refused, and a step would be rare."""
        calls = (self.first_step, self.second_step, self.third_step)
        for number in range(count):
            if self.is_pending and self.handle:
                return
            self.zero_grad(True)
            self.backward(seed + number, mask)
            if rho is not None and self.is_pending:  # the restore must not use it
                self.change_hyper(0, "rho", rho)
            calls[self.model.read](zero_grad)
            self.agrees()

    @rule(seed=seeds, mask=st.integers(0, 15), kind=st.sampled_from(["usual", "view", "strided"]))
    def assign_gradients(self, seed: int, mask: int, kind: str) -> None:
        generator = torch.Generator().manual_seed(seed)
        for i, param in enumerate(self.params):
            grad = torch.randn(param.shape, generator=generator, dtype=torch.float64)
            grad = grad.to(self.dtype)
            if kind == "view":
                grad = torch.cat([grad.reshape(-1), grad.reshape(-1)])[: grad.numel()].view(
                    grad.shape
                )
            elif kind == "strided" and grad.dim():
                grad = torch.stack([grad, grad], -1)[..., 0]
            param.grad = grad if mask >> i % 4 & 1 else None
        self._take_gradients()

    @rule(value=st.sampled_from([float("nan"), float("inf")]), which=st.integers(0, 9))
    def poison(self, value: float, which: int) -> None:
        checked = self.setup.options.get("check_finite") or self.setup.options.get("max_grad_norm")
        found = [param for param in self.params if param.grad is not None and param.numel()]
        if not found or (self.is_pending and not (checked or self.setup.method == "bsam")):
            return  # what is not checked enters the update, see README
        grad = found[which % len(found)].grad
        assert grad is not None
        grad[(0,) * grad.dim()] = value
        self._take_gradients()

    @rule(set_to_none=st.booleans())
    def zero_grad(self, set_to_none: bool) -> None:
        self.optimizer.zero_grad(set_to_none)
        self.model.zero_grad(set_to_none)

    # ---- the step ----------------------------------------------------------------------------

    def _refuses(self, call: Callable[[], Any], error: type[Exception] = RuntimeError) -> None:
        """A call that raises; the invariants see that it changes nothing."""
        self.counts["refused calls"] += 1
        with pytest.raises(error) as raised:
            call()
        assert str(raised.value)

    @rule(zero_grad=st.booleans())
    def first_step(self, zero_grad: bool) -> None:
        call = functools.partial(self.optimizer.first_step, zero_grad=zero_grad)
        if self.is_pending or all(param.grad is None for param in self.model.params):
            self._refuses(call)
            return
        call()
        self.model.first_step(zero_grad)

    @rule(zero_grad=st.booleans())
    def second_step(self, zero_grad: bool) -> None:
        call = functools.partial(self.optimizer.second_step, zero_grad=zero_grad)
        if self.model.read != 1:
            self._refuses(call)
            return
        call()
        self.model.second_step(zero_grad)

    @rule(zero_grad=st.booleans())
    def third_step(self, zero_grad: bool) -> None:
        call = functools.partial(self.optimizer.third_step, zero_grad=zero_grad)
        if self.setup.evaluations != 3 or self.model.read != 2:
            self._refuses(call)
            return
        call()
        self.model.third_step(zero_grad)

    @rule()
    def step_without_closure(self) -> None:
        if self.model.read != self.setup.evaluations - 1:
            self._refuses(self.optimizer.step)
            return
        self.optimizer.step()
        (self.model.second_step if self.model.read == 1 else self.model.third_step)(False)

    @rule(seed=seeds, mask=st.integers(1, 15), fails=st.integers(0, 6), late=st.booleans())
    def step(self, seed: int, mask: int, fails: int, late: bool) -> None:
        """With a closure, which raises in evaluation ``fails`` if there is such a one."""
        made = 0
        late = late and not self.handle  # what the backward has updated stays so

        def closure() -> torch.Tensor:
            nonlocal made
            made += 1
            self.optimizer.zero_grad()
            if made == fails and not late:
                raise Fault
            loss = self._loss(seed + made, mask)
            loss.backward()  # type: ignore[no-untyped-call]
            if made == fails:
                raise Fault
            return loss

        if self.is_pending:
            self._refuses(lambda: self.optimizer.step(closure))
            return
        evaluations = 1 if self.model.is_plain else self.setup.evaluations
        if not any(mask >> i % 4 & 1 for i in range(len(self.params))):
            return
        if 0 < fails <= evaluations:
            with pytest.raises(Fault):
                self.optimizer.step(closure)
            self._take_gradients()
            return
        self.optimizer.step(closure)
        calls = (self.model.first_step, self.model.second_step, self.model.third_step)
        for number, call in enumerate(calls[:evaluations]):
            self.model.zero_grad(True)
            self._model_backward(seed + number + 1, mask)
            call(number == 0)
        if self.handle:
            self.model.zero_grad(True)

    @rule()
    def restore(self) -> None:
        self.optimizer.restore()
        self.model.restore()

    # ---- groups ------------------------------------------------------------------------------

    @rule(good=st.booleans())
    def add_group(self, good: bool) -> None:
        if len(self.params) > 6:
            return
        tensor = self._tensor()
        group: dict[str, Any] = {"params": [torch.nn.Parameter(tensor)]}
        if self.is_pending or not good:
            group.update({} if good else {"rho": -1.0})
            error = RuntimeError if self.is_pending else ValueError
            self._refuses(lambda: self.optimizer.add_param_group(group), error)
            return
        self.optimizer.add_param_group(group)
        self.model.add_group([tensor])

    @rule(
        which=st.integers(0, 9),
        key=st.sampled_from(["lr", "rho", "gamma", "weight_decay"]),
        value=st.sampled_from([0.0, 0.01, 0.3]),
    )
    def change_hyper(self, which: int, key: str, value: float) -> None:
        """At any time: the way back to w has to be that of the radius that led away."""
        index = which % len(self.model.hyper)
        group = self.optimizer.param_groups[index]
        if key not in group or (key == "rho" and self.setup.decaying) or (key, value) == ("lr", 0):
            return
        group[key] = self.model.hyper[index][key] = value

    @rule(which=st.integers(0, 9), key=st.sampled_from(["lr", "rho"]))
    def step_with_wrong_hyper(self, which: int, key: str) -> None:
        """An error that names it; a step in progress is given up and the weights are back."""
        ready = self.model.read in (0, self.setup.evaluations - 1)
        if not ready or (key == "rho" and self.setup.decaying):
            return
        if not self.is_pending and all(param.grad is None for param in self.params):
            return
        group = self.optimizer.param_groups[which % len(self.model.hyper)]
        before, group[key] = group[key], -1.0
        calls = (
            self.optimizer.first_step,
            self.optimizer.second_step,
            getattr(self.optimizer, "third_step", None),
        )
        self._refuses(calls[self.model.read], ValueError)
        group[key] = before
        self.model.restore()

    # ---- copies and checkpoints --------------------------------------------------------------

    @rule()
    def save(self) -> None:
        if self.is_pending:
            self._refuses(self.optimizer.state_dict)
            return
        self.saved.append((copy.deepcopy(self.optimizer.state_dict()), self.model.snapshot()))
        self.saved = self.saved[-2:]

    @precondition(lambda self: self.saved)
    @rule(which=st.integers(0, 1), new=st.booleans())
    def load(self, which: int, new: bool) -> None:
        """Into this optimizer, or into one that is made for the same parameters."""
        state, snapshot = self.saved[which % len(self.saved)]
        if self.is_pending:
            self._refuses(lambda: self.optimizer.load_state_dict(state))
            return
        if len(snapshot.hyper) != len(self.model.hyper):
            self._refuses(lambda: self.optimizer.load_state_dict(state), ValueError)
            return
        if new:
            self._forget_handle()
            groups = [group["params"] for group in self.optimizer.param_groups]
            self.optimizer = self._new_optimizer(groups)
        self.optimizer.load_state_dict(copy.deepcopy(state))
        self.model.load(snapshot)
        self.model.skipped = 0

    @rule(pickles=st.booleans())
    def clone(self, pickles: bool) -> None:
        """Go on with a copy, and with its parameters."""

        def copied() -> Any:
            if pickles:
                return pickle.loads(pickle.dumps(self.optimizer))
            return copy.deepcopy(self.optimizer)

        if self.is_pending:
            self._refuses(copied)
            return
        self.optimizer = copied()
        self._forget_handle()
        self._take_gradients()
        self.model.skipped = 0

    def _forget_handle(self) -> None:
        if self.handle:
            self.handle.remove()
        self.handle = None

    # ---- other things that happen ------------------------------------------------------------

    @rule(which=st.integers(0, 9))
    def move_memory(self, which: int) -> None:
        param = self.params[which % len(self.params)]
        param.data = param.data.clone(memory_format=torch.preserve_format)

    @precondition(lambda self: not self.is_pending)
    @rule()
    def change_layout(self) -> None:
        for param in self.params:
            if param.dim() == 2:
                contiguous = param.data.is_contiguous()
                param.data = (
                    param.data.t().contiguous().t() if contiguous else param.data.contiguous()
                )

    @rule()
    def toggle_update_in_backward(self) -> None:
        if self.handle:
            self._forget_handle()
            return
        options = self.setup.options
        error: type[Exception] | None = None
        if self.is_pending:
            error = RuntimeError
        elif self.setup.method == "bsam":
            error = TypeError
        elif "max_grad_norm" in options or "check_finite" in options:
            error = ValueError
        if error is not None:
            self._refuses(self.optimizer.update_in_backward, error)
            return
        self.handle = self.optimizer.update_in_backward()

    @rule()
    def look(self) -> None:
        """What only asks changes nothing, at any time."""
        assert len(repr(self.optimizer)) > 0
        assert float(self.optimizer.skipped_steps) == self.model.skipped
        for param in self.params:
            assert ":" in self.optimizer.backend_of(param)
        gc.collect(0)

    def teardown(self) -> None:
        """Whatever has happened, a step can be made."""
        if not hasattr(self, "model"):
            return
        self.restore()
        self.zero_grad(True)
        self.step(1, 15, 0, False)
        self.agrees()
        self.look()
        assert all(bool(param.isfinite().all()) for param in self.params)


def run(sequences: int, calls: int, seed: int | None = None) -> None:
    """Make random sequences of calls.

    Args:
        sequences: How many.
        calls: In each, at most.
        seed: Of the choices; None for the same ones each time.
    """
    RandomCalls._hypothesis_internal_use_seed = seed  # type: ignore[attr-defined]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # torch, of gradients that are assigned with strides of their own.
        warnings.filterwarnings("ignore", "grad and param do not obey the gradient layout")
        run_state_machine_as_test(  # type: ignore[no-untyped-call]
            RandomCalls,
            settings=settings(
                max_examples=sequences,
                stateful_step_count=calls,
                deadline=None,
                derandomize=seed is None,
                database=None,
            ),
        )
