"""Generate cases until a number or a time is reached, and count what goes wrong.

Usage: ``python -m benchmarks.reliability fuzz [--cases N] [--seconds S] [--seed K] [--only PART]``.

The cases are those of the tests (``tests/native_fuzz.py``, ``random_steps.py``,
``random_calls.py``), which ``make test`` makes a slice of. Every part runs in processes of its own:
one that crashes is a finding, with the seed that makes it again.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.arguments import whole_number

ROOT = Path(__file__).resolve().parent.parent.parent
TESTS = ROOT / "tests"
STARTING = 120.0  # seconds until a process that has not reported is given up
LEAST_SECONDS = 5


class Part(NamedTuple):
    """A kind of cases.

    Attributes:
        group: What ``--only`` calls it.
        cases: Its share of the cases.
        seconds: Its share of the time.
        what: What a case is.
    """

    group: str
    cases: float
    seconds: float
    what: str


# A call takes a fraction of a millisecond, a list tens, a sequence hundreds.
PARTS = {
    "cpu": Part("native", 0.60, 0.25, "calls of the operations of the CPU"),
    "cuda-emulated": Part("native", 0.15, 0.10, "calls of those of a GPU, emulated"),
    "reader": Part("native", 0.15, 0.05, "calls of the reader of gradients"),
    "steps": Part("steps", 0.08, 0.30, "lists, each stepped by a backend and by the oracle"),
    "calls": Part("calls", 0.02, 0.30, "sequences of public calls beside the model"),
}


@dataclass
class Outcome:
    """What a part has found.

    Attributes:
        cases: Generated.
        notes: More about them.
        crashes: With their seeds.
        corruptions: Whatever was not as it should be, likewise.
    """

    cases: int = 0
    notes: str = ""
    crashes: list[str] = field(default_factory=list)
    corruptions: list[str] = field(default_factory=list)


def fuzz_native(name: str, cases: int, seconds: float, seed: int) -> Outcome:
    """Make calls of native entry points."""
    import native_fuzz

    found = native_fuzz.fuzz(name, seed * 10_000_000, cases, seconds)
    notes = f"{found.accepted} carried out, {found.refused} refused"
    return Outcome(found.cases, notes, found.crashes, found.corruptions)


def fuzz_by_hypothesis(name: str, cases: int, seconds: float, seed: int) -> Outcome:
    """Let a process make cases in batches; start another one behind a batch that crashes."""
    found = Outcome()
    totals: dict[str, int] = {}
    batch = 0
    end = time.monotonic() + seconds
    while found.cases < cases and time.monotonic() < end:
        left = end - time.monotonic()
        numbers = map(str, (cases - found.cases, left, seed, batch))
        command = [sys.executable, str(Path(__file__).with_name("_batches.py")), name, *numbers]
        run = subprocess.run(
            command, env=_environment(), capture_output=True, text=True, timeout=left + 600
        )
        for report in map(json.loads, run.stdout.splitlines()):
            found.cases += report["cases"]
            found.corruptions += report["failures"]
            for what, count in report["counts"].items():
                totals[what] = totals.get(what, 0) + count
            batch = report["batch"] + 1
        if run.returncode > 0:
            raise RuntimeError(f"{name}, batch {batch}: {run.stderr}")
        if run.returncode == 0:
            break
        ended = signal.Signals(-run.returncode).name
        found.crashes.append(f"{name}, seed {seed}, batch {batch}: {ended}\n{run.stderr[-2000:]}")
        batch += 1
    found.notes = ", ".join(f"{count} {what}" for what, count in sorted(totals.items()))
    return found


def _environment() -> dict[str, str]:
    """Return variables with which a process finds the package and the tests' files."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(TESTS)])}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.reliability fuzz",
        description="Generate cases until their number or the time is reached, and print a line "
        "for each part. The exit status is 1 if anything was found.",
    )
    count = whole_number(100, 10**9)
    parser.add_argument("--cases", type=count, default=100_000, help="in all (default 100000)")
    parser.add_argument(
        "--seconds",
        type=whole_number(LEAST_SECONDS, 10**6),
        default=3600,
        help="in all, divided among the parts (default 3600)",
    )
    parser.add_argument("--seed", type=whole_number(0, 10**6), default=0, help="default 0")
    groups = sorted({part.group for part in PARTS.values()})
    parser.add_argument("--only", choices=groups, help="the cases of one group")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Make the cases; return 1 if anything was found, else 0."""
    args = _parser().parse_args(argv)
    sys.path[:0] = [str(ROOT), str(TESTS)]
    chosen = {n: p for n, p in PARTS.items() if args.only in (None, p.group)}
    share = sum(part.seconds for part in chosen.values())
    outcomes = []
    for name, part in chosen.items():
        make: Callable[..., Any] = fuzz_native if part.group == "native" else fuzz_by_hypothesis
        begin = time.monotonic()
        seconds = args.seconds * part.seconds / share
        outcome = make(name, round(args.cases * part.cases), seconds, args.seed)
        outcomes.append(outcome)
        notes = f" ({outcome.notes})" if outcome.notes else ""
        print(
            f"{name}: {outcome.cases} {part.what}{notes}, {len(outcome.crashes)} "
            f"crashes, {len(outcome.corruptions)} corruptions, {time.monotonic() - begin:.0f} s",
            flush=True,
        )
        for finding in [*outcome.crashes, *outcome.corruptions]:
            print(f"  {finding}", flush=True)
    totals = [sum(len(getattr(o, name)) for o in outcomes) for name in ("crashes", "corruptions")]
    cases = sum(outcome.cases for outcome in outcomes)
    print(f"in all: {cases} cases, {totals[0]} crashes, {totals[1]} corruptions")
    return 1 if any(totals) else 0
