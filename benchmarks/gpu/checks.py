"""What the project wants to reach on a GPU, and whether a report shows it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from benchmarks.checks import Outcome
from benchmarks.common import GPU

# At least 1e8 parameters.
LARGE = ("gpt2-small", "llama-1b")
SMALL = "2000x64"
_BASES = ("AdamW", "SGDM")
_DTYPES = ("float32", "bfloat16")
_BUILD_LIMIT_S = 180.0

Report = Mapping[str, Any]


class Found(NamedTuple):
    """A number of the report, or why there is none."""

    value: float | None
    reason: str = ""


class Check(NamedTuple):
    """A bound on a number of the report.

    Attributes:
        where: The case, in words.
        wanted: In words.
        find: Looks for the number in a report.
        bound: The limit.
        at_most: Whether it is an upper one.
        shown: Format of the number.
    """

    where: str
    wanted: str
    find: Callable[[Report], Found]
    bound: float
    at_most: bool = False
    shown: str = "{:.3g}"


def _row(report: Report, table: str, **wanted: str) -> Mapping[str, Any] | None:
    for row in report.get(table, []):
        if all(row.get(key) == value for key, value in wanted.items()):
            found: Mapping[str, Any] = row
            return found
    return None


def _cell(report: Report, table: str, column: str, **wanted: str) -> Found:
    row = _row(report, table, **wanted)
    if row is None:
        return Found(None, "no row")
    if row.get(column) is None:
        return Found(None, row.get("note") or "no figure")
    return Found(float(row[column]))


def _case(shapes: str, base: str = "AdamW", dtype: str = "float32") -> dict[str, str]:
    return {"shapes": shapes, "base": base, "dtype": dtype}


def _step(column: str, contender: str, **case: str) -> Callable[[Report], Found]:
    return lambda report: _cell(report, "rows", column, contender=contender, **case)


def _operation(column: str, operation: str, **case: str) -> Callable[[Report], Found]:
    which = {"backend": "cuda", "operation": operation, **case}
    return lambda report: _cell(report, "operations", column, **which)


def _ratio(column: str, contender: str, **case: str) -> Callable[[Report], Found]:
    """How many times as long a contender takes as the CUDA backend."""

    def find(report: Report) -> Found:
        ours = _cell(report, "rows", "device_ms", contender="cuda", **case)
        if ours.value is None:
            return ours
        return _cell(report, "rows", column, contender=contender, **case)

    return find


def _bandwidth_checks() -> Iterator[Check]:
    for shapes in LARGE:
        for base in _BASES:
            for dtype in _DTYPES:
                case = _case(shapes, base, dtype)
                where = ", ".join(case.values())
                for operation in ("perturb", "update"):
                    yield Check(
                        where,
                        f"{operation}: at least 90% of the copy bandwidth",
                        _operation("share_of_copy", operation, **case),
                        0.90,
                        shown="{:.1%}",
                    )
                yield Check(
                    where,
                    "whole step: at least 85% of the copy bandwidth",
                    _step("share_of_copy", "cuda", **case),
                    0.85,
                    shown="{:.1%}",
                )


def _speed_checks() -> Iterator[Check]:
    for shapes in LARGE:
        case = _case(shapes)
        where = ", ".join(case.values())
        for than, bound in (("authors", 4.0), ("foreach", 1.4)):
            wanted = f"at least {bound:g}x as fast as {than}"
            yield Check(where, wanted, _ratio("ratio_to_ours", than, **case), bound)
    for shapes in LARGE:
        for base in _BASES:
            for dtype in _DTYPES:
                case = _case(shapes, base, dtype)
                yield Check(
                    ", ".join(case.values()),
                    "triton: at most 1.1x the time of cuda",
                    _ratio("ratio_to_ours", "triton", **case),
                    1.10,
                    at_most=True,
                )


def _small_checks() -> Iterator[Check]:
    case = _case(SMALL)
    where = ", ".join(case.values())
    wanted = "at least 40x as fast as authors, nothing queued before"
    yield Check(where, wanted, _ratio("wall_ratio_to_ours", "authors", **case), 40.0)
    wanted = "at most 1.5 ms of host time a step"
    yield Check(where, wanted, _step("host_ms", "cuda", **case), 1.5, True, "{:.3g} ms")
    yield Check(
        where,
        "at most 0.1 ms of host time a step, captured",
        lambda report: _cell(report, "captured", "host_median_ms", **case),
        0.1,
        True,
        "{:.3g} ms",
    )


def _launch_checks() -> Iterator[Check]:
    for shapes in GPU:
        case = _case(shapes)
        find = _step("launches", "cuda", **case)
        yield Check(", ".join(case.values()), "at most 6 launches a step", find, 6, True)
    wanted = "the same launches for every list"
    yield Check("AdamW, float32", wanted, _launch_range, 0, True, "{:g} apart")


def _launch_range(report: Report) -> Found:
    found = [_step("launches", "cuda", **_case(shapes))(report) for shapes in GPU]
    missing = [one for one in found if one.value is None]
    if missing:
        return missing[0]
    values = [one.value for one in found if one.value is not None]
    return Found(max(values) - min(values))


def _stage_checks() -> Iterator[Check]:
    def stage(name: str, key: str) -> Callable[[Report], Found]:
        def find(report: Report) -> Found:
            result = report.get("stages", {}).get(name)
            if result is None:
                return Found(None, "this stage was not run")
            if result.get(key) is None:
                return Found(None, f"the stage ended with exit code {result.get('exit')}")
            return Found(float(result[key]))

        return find

    wanted = "built from a clean tree in at most 180 s"
    find = stage("build", "built_s")
    yield Check("build", wanted, find, _BUILD_LIMIT_S, True, "{:.0f} s")
    yield Check("tests", "no failure", stage("tests", "failures"), 0, True, "{:g} failures")
    yield Check("sanitizer", "no error", stage("sanitize", "failures"), 0, True, "{:g} failures")


CHECKS = (
    *_stage_checks(),
    *_bandwidth_checks(),
    *_speed_checks(),
    *_small_checks(),
    *_launch_checks(),
)


def outcomes(report: Report) -> Iterator[Outcome]:
    """Evaluate all checks."""
    for check in CHECKS:
        value, reason = check.find(report)
        if value is None:
            yield Outcome(check.where, check.wanted, reason, "not measured")
            continue
        good = value <= check.bound if check.at_most else value >= check.bound
        verdict = "reached" if good else "NOT REACHED"
        yield Outcome(check.where, check.wanted, check.shown.format(value), verdict)
