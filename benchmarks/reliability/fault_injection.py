"""How faults are made to happen: in the user's code, at any call and at any allocation."""

from __future__ import annotations

import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.reliability.fault_subjects import Run
from benchmarks.reliability.fault_trials import Fault

ERRORS: dict[str, Callable[[], BaseException]] = {
    "exception": lambda: ArithmeticError("injected"),
    "interrupt": lambda: KeyboardInterrupt("injected"),
    "out of memory": lambda: torch.OutOfMemoryError("injected: no memory"),
}


def in_evaluation(number: int, kind: str, *, has_gradients: bool) -> Fault:
    """Raise in an evaluation, before its backward or after it."""

    @contextmanager
    def fault(run: Run) -> Iterator[None]:
        def disturb(evaluation: int, has: bool) -> None:
            if (evaluation, has) == (number, has_gradients):
                raise ERRORS[kind]()

        run.disturb = disturb
        yield

    return fault


def in_gradient(number: int, change: Callable[[list[Tensor]], None]) -> Fault:
    """Change the gradients of an evaluation."""

    @contextmanager
    def fault(run: Run) -> Iterator[None]:
        def disturb(evaluation: int, has: bool) -> None:
            if has and evaluation == number:
                change(run.params)

        run.disturb = disturb
        yield

    return fault


def poison(value: float, *, whole: bool) -> Callable[[list[Tensor]], None]:
    """Put ``value`` into one element, or a whole gradient, of the second parameter."""

    def change(params: list[Tensor]) -> None:
        grad = params[1].grad
        assert grad is not None
        grad.fill_(value) if whole else grad.view(-1)[2].fill_(value)

    return change


def remove(params: list[Tensor]) -> None:
    """Take the gradient of the second parameter away."""
    params[1].grad = None


def overflow(number: int) -> Fault:
    """Let the scaled loss of an evaluation overflow; the run has a scaler."""

    @contextmanager
    def fault(run: Run) -> Iterator[None]:
        run.loss_factor = lambda evaluation: float("inf") if evaluation == number else 1.0
        yield

    return fault


def in_gradient_hook(number: int, kind: str) -> Fault:
    """Raise in a hook on the gradient of a parameter, in one evaluation."""

    @contextmanager
    def fault(run: Run) -> Iterator[None]:
        def hook(grad: Tensor) -> None:
            if run.evaluated == number + 1:
                raise ERRORS[kind]()

        handle = run.params[0].register_hook(hook)
        try:
            yield
        finally:
            handle.remove()

    return fault


def in_step_hook(kind: str, *, before: bool) -> Fault:
    """Raise in a hook before the step or after it."""

    @contextmanager
    def fault(run: Run) -> Iterator[None]:
        def hook(*arguments: Any) -> None:
            raise ERRORS[kind]()

        optimizer = run.optimizer
        register = optimizer.register_step_pre_hook if before else optimizer.register_step_post_hook
        handle = register(hook)
        try:
            yield
        finally:
            handle.remove()

    return fault


# ---- everywhere ------------------------------------------------------------------------------


class Everywhere:
    """Something that can happen at many places of a step, which are counted.

    Args:
        phase: Happens where so many evaluations have been made.
        place: Which of the places; None to count them only.

    Attributes:
        count: How many places there were up to where it happened.
        happened: Whether it has.
    """

    def __init__(self, phase: int, place: int | None) -> None:
        self._phase = phase
        self._place = place
        self.count = 0
        self.happened = False

    def is_now(self, run: Run) -> bool:
        """Whether this place is the one."""
        if self.happened or run.in_user_code or run.evaluated != self._phase:
            return False
        self.count += 1
        self.happened = self.count - 1 == self._place
        return self.happened


def interrupt(where: Everywhere) -> Fault:
    """Press Ctrl-C at one of the places where Python looks for signals: calls and their ends.

    It is a signal, so that an optimizer that handles them is given the chance.
    """

    @contextmanager
    def fault(run: Run) -> Iterator[None]:
        def profile(frame: FrameType, event: str, argument: object) -> None:
            inside = frame.f_code.co_filename != __file__
            if event in ("call", "c_return") and inside and where.is_now(run):
                signal.raise_signal(signal.SIGINT)

        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.setprofile(profile)
        try:
            yield
        finally:
            sys.setprofile(None)
            signal.signal(signal.SIGINT, before)

    return fault


class _Allocations(TorchDispatchMode):
    """Has no memory for a tensor that the optimizer wants."""

    def __init__(self, run: Run, where: Everywhere) -> None:
        super().__init__()
        self._run = run
        self._where = where

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        schema = func._schema
        allocates = not schema.is_mutable and any(r.alias_info is None for r in schema.returns)
        if allocates and schema.returns and not _in_torch_optimizer():
            if self._where.is_now(self._run):
                raise torch.OutOfMemoryError(f"injected: no memory for {schema.name}")
        return func(*args, **(kwargs or {}))


def _in_torch_optimizer() -> bool:
    """Whether a base optimizer allocates for itself: what that leaves is torch's affair."""
    return any(
        "torch/optim/" in frame.f_code.co_filename and frame.f_code.co_name not in _WRAPPERS
        for frame, _ in traceback.walk_stack(None)
    )


# What torch wraps around the step of every optimizer.
_WRAPPERS = ("wrapper", "zero_grad")


def out_of_memory(where: Everywhere) -> Fault:
    """Have no memory at one of the allocations of the optimizer."""

    def fault(run: Run) -> AbstractContextManager[object]:
        return _Allocations(run, where)

    return fault
