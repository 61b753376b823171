"""The result file of the benchmark of the methods, and its Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.common import PROVENANCE, QUIET_SHARE, write_table
from benchmarks.report import table

Row = Mapping[str, object]

# A method may take this much longer than the memory it moves makes it.
SLACK = 1.15
# Of a step of SAM. RWSAM makes one forward more than SAM's two with their backwards, which is a
# sixth if a backward costs two forwards; ESAM has to be worth it.
STEP_ALLOWED = {"RWSAM": 1.0 + 1.0 / 6.0 + 0.05, "ESAM": 1.0}

FIELDS = (
    "part",
    "case",
    "method",
    "median_ms",
    "moved",
    "ratio",
    "allowed",
    "rounds",
    "others_cpu",
    *PROVENANCE,
)

_OPTIMIZER = """\
The optimizer's part of a step with given gradients. `moved`: float32 elements read and written
per parameter, counted from the operations (`benchmarks/methods/cases.py`). `time / WSAM`: the
median over rounds of the quotient inside a round. `allowed`: {slack:g} times the quotient of what
is moved."""
_STEP = """\
Whole training steps, forward and backward passes included, in BatchNorm's training mode. `allowed`
for RWSAM: one more forward without gradient, counted as a sixth of SAM's step, and 5 % of it."""


def write(path: Path, rows: Sequence[Row]) -> str:
    """Write the result file and the Markdown beside it.

    Args:
        path: The CSV file.
        rows: What was measured.

    Returns:
        The Markdown.
    """
    cells = write_table(path, FIELDS, rows)
    markdown = render(cells)
    path.with_suffix(".md").write_text(markdown)
    return markdown


def reached(row: Mapping[str, str]) -> bool | None:
    """Whether a ratio is within what is allowed; None if nothing is asked of it."""
    return float(row["ratio"]) <= float(row["allowed"]) if row["allowed"] else None


def render(rows: Sequence[Mapping[str, str]]) -> str:
    """Return the Markdown of the rows of a result file."""
    first = rows[0]
    caption = (
        f"float32, on {first['device']}; torch {first['torch']}; commit {first['git']}, sources "
        f"{first['source']}; {first['date']}; {first['rounds']} rounds; `{first['command']}`."
    )
    parts = ["# One step of every method", caption]
    for part, title, rival, explanation in (
        ("optimizer", "## The optimizer's time", "WSAM", _OPTIMIZER.format(slack=SLACK)),
        ("step", "## Whole steps", "SAM", _STEP),
    ):
        parts += [title, explanation]
        cases = dict.fromkeys(row["case"] for row in rows if row["part"] == part)
        for case in cases:
            chosen = [row for row in rows if (row["part"], row["case"]) == (part, case)]
            parts += [f"### {case}", _table(chosen, rival)]
            if float(chosen[0]["others_cpu"]) > QUIET_SHARE:
                parts.append("**The machine was busy: these numbers measure the scheduler.**")
    return "\n\n".join(parts) + "\n"


def summary(rows: Sequence[Mapping[str, str]]) -> str:
    """Return a shorter text: the optimizer's time over WSAM's, and whole steps over SAM's."""
    first = rows[0]
    where = f"{first['device']}, torch {first['torch']}, float32, {first['date']}, `make bench`"
    parts = [f"Time of the optimizer's part of a step over that of WSAM ({where}):"]
    for part, name in (("optimizer", "moved"), ("step", "")):
        chosen = [row for row in rows if row["part"] == part]
        cases = list(dict.fromkeys(row["case"] for row in chosen))
        header = ["method", *([f"{name}, AdamW"] if name else []), *cases]
        lines = []
        for method in dict.fromkeys(row["method"] for row in chosen):
            cells = {row["case"]: row for row in chosen if row["method"] == method}
            moved = [cells[case]["moved"] for case in cases if case.endswith("AdamW")][:1]
            lines.append([method, *moved, *(_shown(cells[case]) for case in cases)])
        parts.append(table(header, lines))
        if part == "optimizer":
            parts.append("Time of a whole step, with its evaluations, over that of SAM:")
    wanted = (
        f"Bold: more than is wanted. That is {SLACK:g} times what the memory moved makes of WSAM's "
        f"time; for a whole step {STEP_ALLOWED['RWSAM']:.3g} for RWSAM (a sixth and 5 %), 1 for "
        "ESAM. A CPU also reads what is written without having been read, such as sums of "
        "micro-batches, which `moved` does not count. `moved` of ESAM is the mean over its steps: "
        "it perturbs tensors at random. More is in "
        "[cpu-methods.md](../benchmarks/results/cpu-methods.md)."
    )
    return "\n\n".join([*parts, wanted])


def _shown(row: Mapping[str, str]) -> str:
    ratio = f"{float(row['ratio']):.2f}"
    return f"**{ratio}**" if reached(row) is False else ratio


def _table(rows: Sequence[Mapping[str, str]], rival: str) -> str:
    header = ("method", "median ms", "moved", f"time / {rival}", "allowed", "")
    verdicts = {None: "", True: "reached", False: "NOT REACHED"}
    lines = [
        (
            row["method"],
            row["median_ms"],
            row["moved"] or "-",
            f"{float(row['ratio']):.3f}",
            f"{float(row['allowed']):.3f}" if row["allowed"] else "-",
            verdicts[reached(row)],
        )
        for row in rows
    ]
    return table(header, lines)
