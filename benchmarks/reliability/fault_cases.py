"""The trials of a cell of the matrix, and what keeps its promise."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from benchmarks.reliability import fault_injection as inject
from benchmarks.reliability.fault_matrix import MATRIX, Kind, Point, Promise
from benchmarks.reliability.fault_subjects import Run, Subject
from benchmarks.reliability.fault_trials import Fault, Left, Observation, observe, same

_NAMES = {
    Kind.EXCEPTION: "exception",
    Kind.INTERRUPT: "interrupt",
    Kind.MEMORY: "out of memory",
}
_EVALUATIONS = {
    Point.BEFORE_G1: (0, False),
    Point.AFTER_G1: (0, True),
    Point.BEFORE_G2: (1, False),
    Point.AFTER_G2: (1, True),
    Point.BEFORE_G3: (2, False),
    Point.AFTER_G3: (2, True),
}
_SCALE = 2.0**10


class Trial(NamedTuple):
    """One fault to let happen.

    Attributes:
        name: Says which.
        fault: The context around the step.
        prepare: Changes the run before its first step.
        happened: Whether the fault came to pass.
    """

    name: str
    fault: Fault
    prepare: Callable[[Run], None] = lambda run: None
    happened: Callable[[], bool] = lambda: True


def applies(point: Point, kind: Kind, subject: Subject) -> bool:
    """Whether a subject can be tried at a cell."""
    if (point, kind) not in MATRIX or MATRIX[point, kind].shown_by:
        return False
    if point in (Point.BEFORE_G3, Point.AFTER_G3, Point.PERTURB_AGAIN):
        return subject.evaluations == 3
    if point == Point.BEGIN and subject.gradient_first:
        return False  # it has nothing to do before the first evaluation
    # A peer has no argument for a scaler.
    return subject.is_ours or kind != Kind.OVERFLOW


def trials(
    point: Point, kind: Kind, subject: Subject, backend: str, at_most: int
) -> Iterator[Trial]:
    """Yield the trials of a cell.

    Args:
        point: Where.
        kind: What.
        subject: An optimizer that it applies to.
        backend: Of ours.
        at_most: How many of the places where it can happen are tried, if there are many.
    """
    if point in _phases(subject):
        yield from _everywhere(_phases(subject)[point], kind, subject, backend, at_most)
        return
    last = subject.evaluations - 1
    if kind in _NAMES:
        name = _NAMES[kind]
        if point == Point.GRADIENT_HOOK:
            yield Trial(name, inject.in_gradient_hook(last, name))
        elif point in (Point.PRE_HOOK, Point.POST_HOOK):
            yield Trial(name, inject.in_step_hook(name, before=point == Point.PRE_HOOK))
        else:
            number, has = _EVALUATIONS[point]
            yield Trial(name, inject.in_evaluation(number, name, has_gradients=has))
        return
    number, _ = _EVALUATIONS[point]
    if kind == Kind.MISSING:
        yield Trial("missing", inject.in_gradient(number, inject.remove))
    elif kind == Kind.OVERFLOW:
        yield Trial("overflow", inject.overflow(number), _with_scaler)
    else:
        for value in (float("nan"), float("inf")):
            for whole in (False, True):
                change = inject.poison(value, whole=whole)
                what = f"{value} in {'one tensor' if whole else 'one element'}"
                yield Trial(what, inject.in_gradient(number, change))


def _phases(subject: Subject) -> dict[Point, int]:
    """After how many evaluations the optimizer is at work at a point."""
    again = {Point.PERTURB_AGAIN: 2} if subject.evaluations == 3 else {}
    return {Point.BEGIN: 0, Point.PERTURB: 1, **again, Point.UPDATE: subject.evaluations}


def _with_scaler(run: Run) -> None:
    run.scaler = torch.amp.GradScaler("cpu", init_scale=_SCALE, growth_interval=1000)


def _everywhere(
    phase: int, kind: Kind, subject: Subject, backend: str, at_most: int
) -> Iterator[Trial]:
    make = inject.interrupt if kind == Kind.INTERRUPT else inject.out_of_memory
    counting = inject.Everywhere(phase, None)
    observe(subject, backend, make(counting))
    stride = max(1, -(-counting.count // at_most))
    for place in range(0, counting.count, stride):
        where = inject.Everywhere(phase, place)
        happened = functools.partial(getattr, where, "happened")
        yield Trial(f"place {place} of {counting.count}", make(where), happened=happened)


# ---- what was promised -----------------------------------------------------------------------


def was_dropped(kind: Kind, seen: Observation) -> bool:
    """Whether an interrupt came to nothing.

    Python reports one that comes while a generator is closed, and drops it.
    """
    return kind == Kind.INTERRUPT and seen.error is None and seen.left is Left.UPDATED


def broken(point: Point, kind: Kind, subject: Subject, seen: Observation) -> str | None:
    """Return how an observation breaks the promise of its cell, None if it keeps it."""
    promise = MATRIX[point, kind].promise
    if seen.is_perturbed:
        return "the optimizer is in the middle of a step"
    passes_on = promise == Promise.PASSED_ON and not subject.checks_all
    if promise == Promise.OTHERS:
        return _broken_by_others(subject, seen)
    if passes_on:
        return _broken_by_passing_on(seen)
    if seen.left not in _ALLOWED.get(promise, (Left.AS_BEFORE,)):
        return seen.left.value
    if not seen.goes_on:
        return "the next step is not the one of an undisturbed optimizer"
    skips = promise in (Promise.SKIPPED, Promise.PASSED_ON)
    if seen.skipped != int(skips) and subject.is_ours:
        return f"{seen.skipped} steps are said to be skipped"
    wanted = None if skips else _ERROR_TYPES[kind]
    if type(seen.error) is not (wanted or type(None)):
        return f"it raised {seen.error!r}"
    return None


_ALLOWED = {
    Promise.WHOLE: (Left.AS_BEFORE, Left.UPDATED),
    Promise.UPDATED: (Left.UPDATED,),
}
_ERROR_TYPES: dict[Kind, type[BaseException]] = {
    Kind.EXCEPTION: ArithmeticError,
    Kind.INTERRUPT: KeyboardInterrupt,
    Kind.MEMORY: torch.OutOfMemoryError,
}


def _broken_by_others(subject: Subject, seen: Observation) -> str | None:
    """The second parameter had no gradient from one evaluation."""
    if seen.error is not None:
        return f"it raised {seen.error!r}"
    number = 1
    now, before = seen.now.weights[number], seen.before.weights[number]
    if not same(now, before, exact=subject.exact):
        return "the parameter without a gradient has changed"
    pairs = zip(seen.now.weights, seen.before.weights, strict=True)
    others = [torch.equal(now, before) for i, (now, before) in enumerate(pairs) if i != number]
    return "others were not updated" if any(others) else None


def _broken_by_passing_on(seen: Observation) -> str | None:
    """The second parameter got something that is not finite; the others must be as ever."""
    if seen.error is not None:
        return f"it raised {seen.error!r}"
    if seen.now.steps != seen.undisturbed.steps:
        return "the step was not counted"
    if bool(seen.now.weights[1].isfinite().all()):
        return "it was not passed on"
    for i in (0, 2):
        if not torch.equal(seen.now.weights[i], seen.undisturbed.weights[i]):
            return "another parameter has changed with it"
    return None
