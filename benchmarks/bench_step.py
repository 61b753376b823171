"""Time a whole WSAM step against other implementations of the same step.

    python -m benchmarks.bench_step [--quick] [--shapes ...] [--bases ...] [--contenders ...]

All contenders of a case run in every round, so that their ratios hold although the speed of the
machine drifts. Before anything is timed, each must compute the same as ours. Results go to
``benchmarks/results`` as CSV, Markdown and a plot.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import report
from benchmarks.bench_memory import measure
from benchmarks.common import (
    FULL,
    QUICK,
    RESULTS,
    count_of,
    environment,
    paired,
    shapes_of,
    spread,
    write_rows,
)
from benchmarks.contenders import BASES, CONTENDERS, ForeachCompiled, Ours, Plain
from benchmarks.contenders.compiled import probe
from benchmarks.harness import (
    ParityError,
    Problem,
    Timings,
    check_all,
    interleave,
    median_rate,
)

Cells = dict[str, Any]


def run_case(
    shapes: str, base: str, names: Sequence[str], options: argparse.Namespace
) -> list[Cells]:
    """Measure one shape list with one base optimizer.

    Args:
        shapes: Name of the shape list.
        base: Name of the base optimizer.
        names: Who takes part.
        options: ``rounds``, ``warmup`` and ``compile_limit``.

    Returns:
        One row per contender and one of the streaming loop, without the run's common columns.
    """
    notes = {name: CONTENDERS[name].unavailable() or "" for name in names}
    extra: dict[str, Cells] = {name: {} for name in names}
    if ForeachCompiled.name in notes and not notes[ForeachCompiled.name]:
        seconds, note = probe(shapes, base, options.compile_limit)
        notes[ForeachCompiled.name] = note
        extra[ForeachCompiled.name]["compile_s"] = "" if math.isnan(seconds) else seconds
    able = [name for name in names if not notes[name]]
    timings = _time(shapes, base, able, options)
    sizes = shapes_of(shapes)
    for name in able:
        memory = measure(CONTENDERS[name], BASES[base], sizes)
        extra[name]["peak_extra_copies"] = memory.peak
        extra[name]["state_extra_copies"] = memory.state
    torch.compiler.reset()  # the next case must not count as a recompilation of this one
    common: Cells = {"base": base, "dtype": "float32", "rounds": len(timings.rounds)}
    common["others_cpu"] = timings.others()
    rows: list[Cells] = []
    for name in names:
        row: Cells = {"operation": "step", "contender": name, "shapes": shapes, "note": notes[name]}
        row |= {"method": "none" if name == Plain.name else "WSAM", **common, **extra[name]}
        row |= {"tensors": len(sizes), "parameters": count_of(sizes)}
        rows.append(row | (_speed(name, base, timings, count_of(sizes)) if name in able else {}))
    return [*rows, _stream_row(timings, shapes, common)]


def _time(shapes: str, base: str, able: Sequence[str], options: argparse.Namespace) -> Timings:
    """Everything large lives only in here."""
    problem = Problem(shapes_of(shapes))
    contenders = [CONTENDERS[name](problem.params, BASES[base]) for name in able]
    title = f"{shapes} {base}"
    if not sys.stderr.isatty():
        print(f"{title}: {len(able)} contenders, {options.rounds} rounds", file=sys.stderr)
        return interleave(problem, contenders, options.rounds, options.warmup)
    from tqdm import tqdm

    with tqdm(total=options.rounds, desc=title, unit="round", leave=False) as bar:
        return interleave(problem, contenders, options.rounds, options.warmup, bar.update)


def _speed(name: str, base: str, timings: Timings, parameters: int) -> Cells:
    times = timings.steps(name)
    moved = CONTENDERS[name].moved(BASES[base])
    rates = [moved * parameters * 4 / ms / 1e6 for ms in times]
    cells: Cells = {
        **spread(times),
        "moved_per_parameter": moved,
        "gb_per_s": median_rate(moved, parameters, times),
        "share_of_stream": paired(rates, timings.stream_rate()),
    }
    for column, rival in (("ratio_to_ours", Ours.name), ("ratio_to_plain", Plain.name)):
        if rival in timings.rounds[0].steps:
            cells[column] = paired(times, timings.steps(rival))
    return cells


def _stream_row(timings: Timings, shapes: str, common: Cells) -> Cells:
    stream = [one.stream for one in timings.rounds]
    return {
        **common,
        "operation": "stream",
        "method": "none",
        "contender": "buffer.mul_",
        "shapes": shapes,
        "tensors": 1,
        "parameters": timings.stream_elements,
        **spread(stream),
        "moved_per_parameter": 2,
        "gb_per_s": median_rate(2, timings.stream_elements, stream),
        "share_of_stream": 1.0,
    }


def check_parity(names: Sequence[str]) -> list[str]:
    """Return the names of those that run and agree with ours.

    Raises:
        ParityError: One of them computes something else.
    """
    agreeing = []
    for name in names:
        contender = CONTENDERS[name]
        if contender.unavailable() is None:
            try:
                check_all([contender], Ours)
            except ParityError:
                raise
            except Exception as error:
                if contender is not ForeachCompiled:
                    raise
                # There may be no C++ compiler; the comparison goes on without this one.
                print(f"{name} left out: {str(error).splitlines()[0]}", file=sys.stderr)
                continue
        agreeing.append(name)
    torch.compiler.reset()
    return agreeing


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--quick", action="store_true", help="small shapes and few rounds: does it work at all?")
    add("--shapes", nargs="+", metavar="LIST", help=f"e.g. {', '.join(FULL)}")
    add("--bases", nargs="+", default=list(BASES), choices=list(BASES))
    add("--contenders", nargs="+", default=list(CONTENDERS), choices=list(CONTENDERS))
    add("--rounds", type=int, help="that count (25, quick: 5)")
    add("--warmup", type=int, default=3, help="rounds before, that do not count (3)")
    add("--compile-limit", type=float, help="seconds for torch.compile per case (120, quick: 30)")
    add("--out", type=Path, help="folder of the results (benchmarks/results, quick: its quick/)")
    options = parser.parse_args(arguments)
    quick = options.quick
    options.shapes = options.shapes or list(QUICK if quick else FULL)
    options.rounds = options.rounds or (5 if quick else 25)
    options.compile_limit = options.compile_limit or (30.0 if quick else 120.0)
    options.out = options.out or (RESULTS / "quick" if quick else RESULTS)
    for name in options.shapes:
        try:
            shapes_of(name)
        except ValueError as error:
            parser.error(str(error))
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure all cases and write the report after each."""
    options = parse(arguments)
    given = sys.argv[1:] if arguments is None else arguments
    common = environment(" ".join(["python -m benchmarks.bench_step", *given]))
    csv_path = options.out / "cpu-step.csv"
    with tempfile.TemporaryDirectory() as cache:
        # Empty at first, so that the seconds of a compilation are those of a first one.
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        try:
            names = check_parity(options.contenders)
        except ParityError as error:
            raise SystemExit(f"error: {error}") from None
        for shapes in options.shapes:
            for base in options.bases:
                rows = [row | common for row in run_case(shapes, base, names, options)]
                write_rows(csv_path, rows)
    print(report.render(csv_path))


@pytest.mark.parametrize("shapes", ["4x64x64", "100x64"])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", [name for name in CONTENDERS if name != ForeachCompiled.name])
def bench_step(benchmark: Any, name: str, base: str, shapes: str) -> None:
    """One step at small size, with setting the gradients, which is the same for all."""
    reason = CONTENDERS[name].unavailable()
    if reason is not None:
        pytest.skip(reason)
    check_all([CONTENDERS[name]], Ours)
    problem = Problem(shapes_of(shapes))
    contender = CONTENDERS[name](problem.params, BASES[base])
    benchmark(problem.step, contender)


if __name__ == "__main__":
    main()
