"""Long runs: what grows over many steps, and where recomputed weights drift.

    python -m benchmarks.reliability long --steps 1000000 [--only TEXT] [--page FILE]

Fails (status 1) if something grows, or if weights that are kept as copies move at lr = 0. Writes
``benchmarks/results/reliability/long.csv``, where a case that was not run keeps its rows, and
``long.md`` with the tables, and fills the marked blocks of a page with them.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.arguments import whole_number
from benchmarks.common import PROVENANCE, RESULTS, environment, read_rows, text, write_table
from benchmarks.readme import filled
from benchmarks.reliability.drift import PROBLEMS, trainings, walk
from benchmarks.reliability.growth import TRAININGS, growth, readings
from benchmarks.reliability.long_tables import tables

FIELDS = ("part", "case", "steps", "of", "quantity", "value", *PROVENANCE)
OUT = RESULTS / "reliability"
Found = tuple[list[dict[str, object]], list[str]]

# What the walk and the trainings are made with: options, and the share of the steps.
PRECISIONS: Mapping[str, tuple[dict[str, Any], float]] = {
    "float32, recomputed": ({}, 1.0),
    "float32, `restore='backup'`": ({"restore": "backup"}, 0.1),
    "bfloat16 (a copy)": ({"dtype": torch.bfloat16}, 0.1),
    "bfloat16, `master_weights`": ({"dtype": torch.bfloat16, "master_weights": True}, 0.1),
}


def _rows(part: str, case: str, found: Sequence[Any], of: str = "") -> list[dict[str, object]]:
    """Return one row for every quantity of every reading; the field ``of`` says of what."""
    return [
        {
            "part": part,
            "case": case,
            "steps": each.steps,
            "of": getattr(each, of) if of else "",
            "quantity": name,
            "value": value,
        }
        for each in found
        for name, value in each._asdict().items()
        if name not in ("steps", of) and value is not None
    ]


def _grows(case: str, steps: int) -> Found:
    make, share = TRAININGS[case]
    found = readings(make(), _share(steps, share))
    return _rows("growth", case, found), [f"{case}: {line}" for line in growth(found)]


def _walks(case: str, steps: int) -> Found:
    options, share = PRECISIONS[case]
    found = walk(_share(steps, share), **options)
    farthest = max(each.farthest for each in found)
    recomputes = not options
    wrong = [] if recomputes or farthest == 0 else [f"{case}: moved by {farthest:g} spacings"]
    return _rows("walk", case, found, "magnitude"), wrong


def _trains(case: str, steps: int) -> Found:
    share = 1.0 if case == next(iter(PROBLEMS)) else 0.1
    return _rows("training", case, trainings(case, _share(steps, share))), []


def _share(steps: int, share: float) -> int:
    """Return a whole number of tenths."""
    return max(10, int(steps * share) // 10 * 10)


CASES: Mapping[str, tuple[Callable[[str, int], Found], Sequence[str]]] = {
    "growth": (_grows, tuple(TRAININGS)),
    "walk": (_walks, tuple(PRECISIONS)),
    "training": (_trains, tuple(PROBLEMS)),
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.reliability long", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--steps", type=whole_number(100, 10**9), default=1_000_000)
    parser.add_argument("--only", default="", metavar="TEXT", help="cases with it in PART: CASE")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the results")
    parser.add_argument("--page", type=Path, help="whose marked blocks the tables go into")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the cases and write what was found.

    Raises:
        SystemExit: With 1 if something grew or moved that must not, with 2 for wrong arguments.
    """
    parser = _parser()
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    names = [(part, case) for part, (_, cases) in CASES.items() for case in cases]
    chosen = [(part, case) for part, case in names if options.only in f"{part}: {case}"]
    if not chosen:
        allowed = "; ".join(f"{part}: {case}" for part, case in names)
        parser.error(f"argument --only: {options.only!r} is in no case; there are {allowed}")
    where = environment(f"python -m benchmarks.reliability long --steps {options.steps}")
    problems = []
    for part, case in chosen:
        begin = time.perf_counter()
        rows, wrong = CASES[part][0](case, options.steps)
        seconds = time.perf_counter() - begin
        _keep(options.out / "long.csv", [{**row, **where} for row in rows])
        print(f"{part}: {case}: {'; '.join(wrong) or 'as promised'} ({seconds:.0f} s)", flush=True)
        problems += wrong
    blocks = tables(read_rows(options.out / "long.csv"))
    (options.out / "long.md").write_text("# Long runs\n\n" + "\n\n".join(blocks.values()) + "\n")
    if options.page is not None:
        options.page.write_text(filled(options.page.read_text(), blocks))
    if problems:
        sys.exit(1)


def _keep(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Replace the rows of the same case; cases of several processes may be written in turns."""
    cells = [{field: text(row[field]) for field in FIELDS} for row in rows]
    names = {(row["part"], row["case"]) for row in cells}
    kept = [row for row in read_rows(path) if (row["part"], row["case"]) not in names]
    order = [(part, case) for part, (_, cases) in CASES.items() for case in cases]
    together = [*kept, *cells]
    together.sort(key=lambda row: order.index((row["part"], row["case"])))
    write_table(path, FIELDS, together)
