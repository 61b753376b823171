"""One fault in one step: what is left of weights and state, and whether the next step is right."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from enum import Enum
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.reliability.fault_subjects import Run, Snapshot, Subject

# Steps before the fault.
WARM_UP = 2

Fault = Callable[[Run], AbstractContextManager[object]]


class Left(Enum):
    """What a fault has left behind."""

    AS_BEFORE = "as before"
    UPDATED = "updated as a whole"
    PERTURBED = "weights left perturbed"
    HALF = "half-updated"
    NOT_FINITE = "weights not finite"
    OTHER = "updated otherwise"


class Observation(NamedTuple):
    """What was seen.

    Attributes:
        left: Of the step with the fault.
        error: What it raised, None if nothing.
        goes_on: Whether the next step ends where an undisturbed optimizer ends. After a step that
            left all as before this is the same step again, after others the following one.
        skipped: How many steps the optimizer says that it skipped; 0 for a peer.
        is_perturbed: Whether the optimizer says that a step is in progress.
        before: Right before the step with the fault.
        now: Right after it.
        undisturbed: Right after the same step without it.
    """

    left: Left
    error: BaseException | None
    goes_on: bool
    skipped: int
    is_perturbed: bool
    before: Snapshot
    now: Snapshot
    undisturbed: Snapshot


class Expected(NamedTuple):
    """An undisturbed run: before the step in question, after it, and after the next."""

    before: Snapshot
    after: Snapshot
    next: Snapshot


@functools.cache
def undisturbed(subject: Subject, backend: str) -> Expected:
    """Make the steps without a fault."""
    run = _warmed_up(subject, backend)
    before = run.snapshot()
    run.step(WARM_UP)
    after = run.snapshot()
    run.step(WARM_UP + 1)
    return Expected(before, after, run.snapshot())


def _warmed_up(subject: Subject, backend: str) -> Run:
    run = Run(subject, backend)
    for number in range(WARM_UP):
        run.step(number)
    return run


def observe(
    subject: Subject,
    backend: str,
    fault: Fault,
    prepare: Callable[[Run], None] = lambda run: None,
) -> Observation:
    """Let a fault happen in a step.

    Args:
        subject: What to train with.
        backend: Of ours.
        fault: A context around the step in which it happens.
        prepare: Changes the run before its first step.
    """
    expected = undisturbed(subject, backend)
    run = Run(subject, backend)
    prepare(run)
    for number in range(WARM_UP):
        run.step(number)
    disturb, factor = run.disturb, run.loss_factor
    error: BaseException | None = None
    try:
        with fault(run):
            run.step(WARM_UP)
    except (Exception, KeyboardInterrupt) as raised:
        error = raised.with_traceback(None)
        # torch.no_grad() does not put it back if it is interrupted in its own last line.
        torch.set_grad_enabled(True)
    run.disturb, run.loss_factor = disturb, factor
    now = run.snapshot()
    left = _left(expected, now, exact=subject.exact)
    is_perturbed = subject.is_ours and run.optimizer.is_perturbed
    skipped = int(run.optimizer.skipped_steps) if subject.is_ours else 0
    goes_on = False
    if left in (Left.AS_BEFORE, Left.UPDATED) and not is_perturbed:
        again = left == Left.AS_BEFORE
        run.step(WARM_UP if again else WARM_UP + 1)
        wanted = expected.after if again else expected.next
        goes_on = same(run.snapshot()[:2], wanted[:2], exact=subject.exact)
    return Observation(
        left, error, goes_on, skipped, is_perturbed, expected.before, now, expected.after
    )


def _left(expected: Expected, now: Snapshot, *, exact: bool) -> Left:
    before, after = expected.before, expected.after
    if same(now[:2], before[:2], exact=exact):
        return Left.AS_BEFORE
    if same(now, after, exact=exact):
        return Left.UPDATED
    if not all(bool(weight.isfinite().all()) for weight in now.weights):
        return Left.NOT_FINITE
    if same((now.states,), (before.states,), exact=True):
        # Of a base optimizer without a state nobody could tell; all of these have one.
        return Left.PERTURBED
    states = zip(before.states, now.states, strict=False)
    weights = zip(before.weights, now.weights, strict=True)
    changed = [not torch.equal(then, value) for then, value in [*states, *weights]]
    return Left.OTHER if all(changed) and len(now.states) == len(before.states) else Left.HALF


def same(left: object, right: object, *, exact: bool) -> bool:
    """Whether two snapshots, or parts of them, are equal: bit by bit, or but for a rounding."""
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        if exact or torch.equal(left, right):
            return torch.equal(left, right)
        # w + e and what is taken from it are rounded once each, and the next step makes 1.05 times
        # that of its gradient: 8 units of numbers below 4.
        return torch.allclose(left, right, rtol=0.0, atol=32 * torch.finfo(left.dtype).eps)
    if isinstance(left, (tuple, list)) and isinstance(right, (tuple, list)):
        pairs = zip(left, right, strict=False)
        return len(left) == len(right) and all(same(a, b, exact=exact) for a, b in pairs)
    return left == right


def no_fault(run: Run) -> AbstractContextManager[object]:
    """Disturb nothing."""
    return nullcontext()
