"""Time every method against WSAM, and whole steps of ESAM and RWSAM against SAM.

    python -m benchmarks.bench_methods [--quick] [--shapes ...] [--bases ...]

First the optimizer's own time, with given gradients: a method may take as much longer than WSAM as
it moves more memory. Then whole training steps of two nets, where the evaluations are
what costs. Everything that is compared runs in every round. Results go to ``benchmarks/results`` as
CSV and Markdown.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.common import RESULTS, environment, paired, shapes_of
from benchmarks.contenders.contender import BASES
from benchmarks.load import quiet_rounds
from benchmarks.methods import results
from benchmarks.methods.cases import CASES, REFERENCE
from benchmarks.methods.given import GivenGradients
from benchmarks.methods.net import METHODS, Net, Training, nets
from benchmarks.methods.results import Row

_SHAPES, _QUICK_SHAPES = ("8x4096x1024", "resnet18", "gpt2-small"), ("8x128x128",)


def interleave(
    steps: Mapping[str, Callable[[], float]], rounds: int, warmup: int, title: str
) -> tuple[dict[str, list[float]], float]:
    """Make every step once per round, each time in another order; the quietest rounds count.

    Args:
        steps: What is timed; each returns milliseconds.
        rounds: How many count.
        warmup: How many are made before and do not count.
        title: Of the progress bar.

    Returns:
        The milliseconds by round, and the mean share of the cores that other processes used.
    """
    shuffler = random.Random(0)

    def measured() -> dict[str, float]:
        return {name: steps[name]() for name in shuffler.sample(list(steps), len(steps))}

    with tqdm(total=rounds, desc=title, unit="round", disable=not sys.stderr.isatty()) as bar:
        found = quiet_rounds(measured, rounds, warmup, bar.update)
    times = {name: [one[name] for _, one in found] for name in steps}
    return times, statistics.mean(share for share, _ in found)


def optimizer_rows(shapes: str, base_name: str, options: argparse.Namespace) -> Iterator[Row]:
    """Time the optimizer's part of a step of every method.

    Args:
        shapes: Name of the shape list.
        base_name: Name of the base optimizer.
        options: ``rounds`` and ``warmup``.
    """
    base = BASES[base_name]
    given = GivenGradients(shapes_of(shapes))
    optimizers = {
        case.name: case.make(given.params, base.optimizer, **base.options) for case in CASES
    }
    for optimizer in optimizers.values():  # values do not matter here, and memory does
        optimizer.state = optimizers[REFERENCE].state

    def timed(case: Any) -> Callable[[], float]:
        return lambda: given.step(case, optimizers[case.name])

    title = f"{shapes}, {base_name}"
    steps = {case.name: timed(case) for case in CASES}
    times, others = interleave(steps, options.rounds, options.warmup, title)
    active = {name: statistics.mean(shares) for name, shares in given.active.items()}
    moved = {case.name: base.fused_moved + active[case.name] * case.extra for case in CASES}
    for case in CASES:
        yield {
            "part": "optimizer",
            "case": title,
            "method": case.name,
            "median_ms": statistics.median(times[case.name]),
            "moved": moved[case.name],
            "ratio": paired(times[case.name], times[REFERENCE]),
            "allowed": results.SLACK * moved[case.name] / moved[REFERENCE],
            "rounds": options.rounds,
            "others_cpu": others,
        }


def step_rows(net: Net, options: argparse.Namespace) -> Iterator[Row]:
    """Time whole training steps.

    Args:
        net: What is trained.
        options: ``rounds`` and ``warmup``.
    """
    steps = {name: Training(name, net).step for name in METHODS}
    times, others = interleave(steps, options.rounds, options.warmup, net.name)
    for name in METHODS:
        yield {
            "part": "step",
            "case": net.name,
            "method": name,
            "median_ms": statistics.median(times[name]),
            "ratio": paired(times[name], times["SAM"]),
            "allowed": results.STEP_ALLOWED.get(name, ""),
            "rounds": options.rounds,
            "others_cpu": others,
        }


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_methods", description=__doc__.splitlines()[0]
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="small shapes and few rounds: does it work at all?")
    add("--shapes", nargs="+", metavar="LIST", help=f"e.g. {', '.join(_SHAPES)}")
    add("--bases", nargs="+", default=list(BASES), choices=list(BASES))
    add("--rounds", type=int, help="that count (15, quick: 3)")
    add("--warmup", type=int, default=2, help="rounds before, that do not count (2)")
    add("--out", type=Path, help="folder of the results (benchmarks/results, quick: its quick/)")
    options = parser.parse_args(arguments)
    quick = options.quick
    options.shapes = options.shapes or list(_QUICK_SHAPES if quick else _SHAPES)
    if options.rounds is None:
        options.rounds = 3 if quick else 15
    options.out = options.out or (RESULTS / "quick" if quick else RESULTS)
    if options.rounds < 1 or options.warmup < 0:
        parser.error("argument --rounds has to be >= 1 and --warmup >= 0")
    for name in options.shapes:
        try:
            shapes_of(name)
        except ValueError as error:
            parser.error(str(error))
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure everything and write the results."""
    options = parse(arguments)
    given = sys.argv[1:] if arguments is None else arguments
    common = environment(" ".join(["python -m benchmarks.bench_methods", *given]))
    rows: list[Row] = []
    for net in nets(options.quick):
        rows += step_rows(net, options)
    for shapes in options.shapes:
        for base in options.bases:
            rows += optimizer_rows(shapes, base, options)
    rows = [{**row, **common} for row in rows]
    print(results.write(options.out / "cpu-methods.csv", rows))


if __name__ == "__main__":
    main()
