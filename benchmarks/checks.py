"""What the project wants to reach, and whether a result file shows it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from benchmarks.common import Row

_OURS, _BASE = "wsam_fused", "AdamW"
_LARGE = ("8x4096x1024", "resnet18", "gpt2-small")
_SMALL = ("2000x64",)


class Check(NamedTuple):
    """A bound on one cell of the results.

    Attributes:
        shapes: The shape lists it is for.
        wanted: In words, with a place for the bound.
        contender: Whose row.
        column: Which cell.
        bound: The limit.
        at_most: Whether the bound is an upper one.
    """

    shapes: tuple[str, ...]
    wanted: str
    contender: str
    column: str
    bound: float
    at_most: bool = False


def _faster(shapes: tuple[str, ...], than: str, bound: float) -> Check:
    return Check(shapes, f"at least {{:g}}x as fast as {than}", than, "ratio_to_ours", bound)


CHECKS = (
    _faster(_LARGE, "authors", 4.0),
    _faster(_LARGE, "authors-fused", 3.0),
    _faster(_LARGE, "foreach", 1.5),
    _faster(_LARGE, "foreach-compiled", 1.0),
    Check(_LARGE, "at most {:g}x the time of plain", _OURS, "ratio_to_plain", 1.9, True),
    Check(_LARGE, "at least {:.0%} of the streaming bandwidth", _OURS, "share_of_stream", 0.85),
    _faster(_SMALL, "authors", 50.0),
    _faster(_SMALL, "foreach", 13.0),
    _faster(_SMALL, "plain", 5.0),
    Check(_LARGE + _SMALL, "at most {:g} extra copies", _OURS, "peak_extra_copies", 1.05, True),
    Check(_LARGE + _SMALL, "{:g} copies in state_dict()", _OURS, "state_extra_copies", 0.0, True),
)


class Outcome(NamedTuple):
    """A check against the results; all texts.

    Attributes:
        shapes: The shape list.
        wanted: The bound in words.
        measured: The cell, or why it is empty.
        verdict: ``reached``, ``NOT REACHED`` or ``not measured``.
    """

    shapes: str
    wanted: str
    measured: str
    verdict: str


def outcomes(rows: Sequence[Row]) -> Iterator[Outcome]:
    """Evaluate all checks of the shape lists that were measured."""
    cells = {
        (row["shapes"], row["contender"]): row
        for row in rows
        if row["operation"] == "step" and row["base"] == _BASE
    }
    for shapes in _LARGE + _SMALL:
        for check in CHECKS:
            if shapes in check.shapes and (shapes, _OURS) in cells:
                yield _evaluate(check, shapes, cells.get((shapes, check.contender)))


def _evaluate(check: Check, shapes: str, row: Row | None) -> Outcome:
    wanted = check.wanted.format(check.bound)
    if row is None or not row[check.column]:
        reason = row["note"] if row else ""
        return Outcome(shapes, wanted, reason or "no row", "not measured")
    value = float(row[check.column])
    good = value <= check.bound if check.at_most else value >= check.bound
    return Outcome(shapes, wanted, f"{value:.3g}", "reached" if good else "NOT REACHED")
