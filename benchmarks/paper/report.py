"""Files of an experiment, and the overview of all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common import Row, environment, read_rows, write_table
from benchmarks.demo_report import table
from benchmarks.paper.experiment import OUT, Experiment, Options, Report

_FINDINGS = "findings.csv"
_FIELDS = (
    "experiment",
    "source",
    "claim",
    "found",
    "verdict",
    "size",
    "seconds",
    "device",
    "torch",
    "source_hash",
    "date",
    "command",
)


def write(
    experiment: Experiment,
    report: Report,
    options: Options,
    seconds: float,
    command: str,
    order: Sequence[str],
) -> Path:
    """Write ``NAME.csv``, ``NAME.png`` and ``NAME.md``, and bring the overview up to date.

    Args:
        experiment: The experiment.
        report: What it found.
        options: How it was made.
        seconds: That it took, with what earlier calls had computed.
        command: That made it.
        order: Of the experiments in the overview.

    Returns:
        The Markdown file.
    """
    options.out.mkdir(parents=True, exist_ok=True)
    base = options.out / experiment.name
    write_table(base.with_suffix(".csv"), list(report.rows[0]), report.rows)
    report.figure.savefig(base.with_suffix(".png"), format="png", dpi=130)
    found = table(
        ("source", "the paper", "here", "verdict"),
        [(f.source, f.claim, f.found, f.verdict) for f in report.findings],
    )
    where = environment(command)
    sources = ", ".join(report.sources or [where["source"]])
    spent = seconds if report.training is None else report.training
    kind = "" if report.training is None else " of training, all runs added up"
    provenance = (
        f"`{command}`, {_duration(spent)}{kind} ({options.size} size); {where['device']}, torch "
        f"{where['torch']}, sources {sources}, {where['date']}."
    )
    parts = [
        f"# {experiment.title}",
        experiment.source,
        report.text.strip(),
        f"![{report.caption}]({experiment.name}.png)",
        "## Findings",
        found,
        report.notes.strip(),
        provenance,
    ]
    path = base.with_suffix(".md")
    path.write_text("\n\n".join(part for part in parts if part) + "\n")
    rows = [
        {
            "experiment": experiment.name,
            "source": finding.source,
            "claim": finding.claim,
            "found": finding.found,
            "verdict": finding.verdict,
            "size": options.size,
            "seconds": f"{spent:.0f}",
            "device": where["device"],
            "torch": where["torch"],
            "source_hash": sources,
            "date": where["date"],
            "command": command,
        }
        for finding in report.findings
    ]
    _note(options.out / _FINDINGS, experiment.name, rows, order)
    (options.out / "README.md").write_text(overview(options.out))
    return path


def _note(path: Path, name: str, new: Sequence[Row], order: Sequence[str]) -> None:
    """Replace the findings of an experiment."""
    rows = [row for row in read_rows(path) if row["experiment"] != name] + list(new)
    rows.sort(key=lambda row: order.index(row["experiment"]))
    write_table(path, _FIELDS, rows)


def overview(folder: Path = OUT) -> str:
    """Return the text of the overview: a row for every finding, and the pictures.

    Args:
        folder: With the results of experiments.
    """
    grouped: dict[tuple[str, str], list[Row]] = {}
    for row in read_rows(folder / _FINDINGS):
        grouped.setdefault((row["experiment"], row["source"]), []).append(row)
    headers = ("experiment", "source", "the paper", "here", "verdict", "command", "time")
    # Not padded: a cell holds many lines.
    lines = [headers, ["---"] * len(headers)]
    lines += [_overview_row(*place, rows) for place, rows in grouped.items()]
    text = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    names = list(dict.fromkeys(name for name, _ in grouped))
    pictures = [f"![{name}]({name}.png)" for name in names if (folder / f"{name}.png").exists()]
    return "\n\n".join([_INTRODUCTION.strip(), text, *pictures]) + "\n"


def _overview_row(name: str, source: str, rows: Sequence[Row]) -> list[str]:
    """Return the cells of a table or figure of a paper: its claims, and what was found of each."""
    claims = list(dict.fromkeys(row["claim"] for row in rows))
    numbers = [f"{claims.index(row['claim']) + 1}. " if len(claims) > 1 else "" for row in rows]
    verdicts = Counter(row["verdict"] for row in rows)
    return [
        f"[{name}]({name}.md)",
        source,
        "<br>".join(
            f"{number}. {claim}" if len(claims) > 1 else claim
            for number, claim in enumerate(claims, 1)
        ),
        "<br>".join(
            f"{number}{row['found']}: *{row['verdict']}*"
            for number, row in zip(numbers, rows, strict=True)
        ),
        "<br>".join(
            f"**{verdict}**" + (f" ({count} of {len(rows)})" if len(rows) > 1 else "")
            for verdict, count in verdicts.items()
        ),
        f"`{rows[0]['command']}`",
        _duration(float(rows[0]["seconds"])),
    ]


_INTRODUCTION = """
# The papers' experiments

Made by `python -m benchmarks.paper NAME` (without a name: the list); `--full` makes them as large
as in the papers, and needs the CIFAR files and a GPU. What stands here is what small data and a
small machine allow: a claim about CIFAR that is not seen on 400 handwritten digits is not refuted
by that, and one that is seen there is not confirmed. A difference counts if its 95 % confidence
interval (Welch, over seeds) leaves out zero, else the verdict is *cannot tell at this size*;
intervals are not widened for the number of comparisons. Results that disagree are kept. Each page
names the machine, the torch version and the hash of our sources. Times of what was trained are
those of all its runs added up, also those that another experiment had made (on two cores about
half of that passes); else of the command.

The commands in the table write this page; do not edit it.
"""


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
