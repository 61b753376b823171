"""What is promised for every fault at every point of a step: the matrix as data."""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple


class Point(Enum):
    """Where in a step something happens; the values are titles."""

    BEGIN = "before the first evaluation"
    BEFORE_G1 = "first evaluation, before its backward"
    AFTER_G1 = "first evaluation, after its backward (g1)"
    PERTURB = "after g1: norm, perturbation"
    BEFORE_G2 = "second evaluation, before its backward"
    AFTER_G2 = "second evaluation, after its backward (g2)"
    PERTURB_AGAIN = "after g2 of three: second perturbation"
    BEFORE_G3 = "third evaluation, before its backward"
    AFTER_G3 = "third evaluation, after its backward (g3)"
    UPDATE = "after the last gradient: restore, update"
    GRADIENT_HOOK = "hook of a gradient, last evaluation"
    PRE_HOOK = "hook before a step"
    POST_HOOK = "hook after a step"
    ALL_REDUCE = "sum of norms over ranks"
    STATE_DICT = "`state_dict()`"
    LOAD_STATE_DICT = "`load_state_dict()`"


class Kind(Enum):
    """What happens; the values are titles."""

    EXCEPTION = "exception"
    INTERRUPT = "KeyboardInterrupt"
    MEMORY = "out of memory"
    NOT_FINITE = "NaN or Inf, one element or all"
    MISSING = "missing gradient"
    OVERFLOW = "loss scale overflow"
    KILL = "SIGKILL, resume"
    RANK = "a rank dies"


class Promise(Enum):
    """What is left afterwards; the values are for the table."""

    AS_BEFORE = "all as before; the error goes on"
    WHOLE = "all as before, or all updated and counted; the error goes on"
    UPDATED = "all updated and counted; the error goes on"
    SKIPPED = "all as before; the step counts as skipped"
    PASSED_ON = "skipped where g2 is checked, else passed on to the base optimizer as by torch"
    OTHERS = "that parameter as before, the others updated"
    RESUMED = "resumed from the last checkpoint, bit for bit the run that was not killed"
    OTHER_RANKS = "the other ranks: all as before, an error within the group's timeout"


class Cell(NamedTuple):
    """One fault at one point.

    Attributes:
        promise: What is left.
        shown_by: The test that shows it; the default is the command that writes the table, of
            which tests/test_fault_matrix.py runs a part.
    """

    promise: Promise
    shown_by: str = ""


_RANKS = "tests/test_fault_ranks.py"
_KILL = "tests/test_fault_kill.py"
_CHECKPOINTS = "tests/test_fault_checkpoints.py"

_ERRORS = (Kind.EXCEPTION, Kind.INTERRUPT, Kind.MEMORY)
_EVALUATIONS = (
    Point.BEFORE_G1,
    Point.AFTER_G1,
    Point.BEFORE_G2,
    Point.AFTER_G2,
    Point.BEFORE_G3,
    Point.AFTER_G3,
)
_OURS = (Point.BEGIN, Point.PERTURB, Point.PERTURB_AGAIN, Point.UPDATE)
_WITH_GRADIENTS = (Point.AFTER_G1, Point.AFTER_G2, Point.AFTER_G3)


def _matrix() -> dict[tuple[Point, Kind], Cell]:
    cells: dict[tuple[Point, Kind], Cell] = {}
    for point in (*_EVALUATIONS, Point.GRADIENT_HOOK, Point.PRE_HOOK, Point.POST_HOOK):
        promise = Promise.UPDATED if point == Point.POST_HOOK else Promise.AS_BEFORE
        for kind in _ERRORS:
            cells[point, kind] = Cell(promise)
    for point in _OURS:
        promise = Promise.WHOLE if point == Point.UPDATE else Promise.AS_BEFORE
        cells[point, Kind.INTERRUPT] = Cell(promise)
        cells[point, Kind.MEMORY] = Cell(Promise.AS_BEFORE)
    for point in _WITH_GRADIENTS:
        promise = Promise.PASSED_ON if point == Point.AFTER_G2 else Promise.SKIPPED
        cells[point, Kind.NOT_FINITE] = Cell(promise)
        cells[point, Kind.MISSING] = Cell(Promise.OTHERS)
        cells[point, Kind.OVERFLOW] = Cell(Promise.SKIPPED)
    for kind in _ERRORS:
        cells[Point.ALL_REDUCE, kind] = Cell(Promise.AS_BEFORE, _RANKS)
        cells[Point.STATE_DICT, kind] = Cell(Promise.AS_BEFORE, _CHECKPOINTS)
        cells[Point.LOAD_STATE_DICT, kind] = Cell(Promise.AS_BEFORE, _CHECKPOINTS)
    cells[Point.ALL_REDUCE, Kind.NOT_FINITE] = Cell(Promise.SKIPPED, _RANKS)
    cells[Point.ALL_REDUCE, Kind.RANK] = Cell(Promise.OTHER_RANKS, _RANKS)
    cells[Point.BEFORE_G2, Kind.RANK] = Cell(Promise.OTHER_RANKS, "tests/test_rank_failures.py")
    for point in (Point.AFTER_G1, Point.PERTURB, Point.AFTER_G2, Point.UPDATE, Point.STATE_DICT):
        cells[point, Kind.KILL] = Cell(Promise.RESUMED, _KILL)
    return cells


MATRIX = _matrix()

# Where a promise is not kept: subject, backend, point, kind.
GAPS = {
    ("WSAM, RMSprop", "eager", Point.UPDATE, Kind.MEMORY): (
        "a foreign base optimizer has made its step when `eager` has no memory for subtracting the "
        "decoupled term: the weights are those of the base optimizer's step, the step is not "
        "counted. The compiled kernels need no memory there"
    ),
}

# Why the other cells are empty: by kind, then by point where that says more.
_WHY_KIND = {
    Kind.EXCEPTION: "no code of the user runs there; what can fail is memory",
    Kind.NOT_FINITE: "no gradient arrives there",
    Kind.MISSING: "no gradient arrives there",
    Kind.OVERFLOW: "no gradient arrives there",
    Kind.KILL: "as at the points that are tried: nothing of the process is left, wherever it was",
    Kind.RANK: "the ranks meet in the backward and in the sum of norms only",
}
_WHY = {
    (Point.GRADIENT_HOOK, Kind.NOT_FINITE): "a hook that returns one: see that gradient",
    (Point.GRADIENT_HOOK, Kind.MISSING): "a hook cannot remove a gradient",
    (Point.GRADIENT_HOOK, Kind.OVERFLOW): "a hook that returns one: see that gradient",
    (Point.ALL_REDUCE, Kind.MISSING): "a rank without gradients takes part: tests/test_sharding.py",
    (Point.ALL_REDUCE, Kind.OVERFLOW): "what is summed is a norm: see NaN or Inf",
}


def why_empty(point: Point, kind: Kind) -> str:
    """Return why a cell is not in the matrix.

    Raises:
        KeyError: It is, or should be.
    """
    if (point, kind) in MATRIX:
        raise KeyError((point, kind))
    return _WHY.get((point, kind)) or _WHY_KIND[kind]
