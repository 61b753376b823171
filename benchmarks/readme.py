"""Keep the figures in README.md and docs/methods.md those of the result files.

``python -m benchmarks.readme`` writes them between the markers; a test compares them.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

from benchmarks.checks import outcomes
from benchmarks.common import RESULTS, ROOT, Row, read_rows
from benchmarks.methods.results import summary
from benchmarks.training_memory import summary as memory_summary

README = ROOT / "README.md"
METHODS = ROOT / "docs" / "methods.md"

_OTHERS = {
    "authors": "the authors' formulation, eager",
    "authors-fused": "the same, base with `fused=True`",
    "pytorch-optimizer": "`WSAM` of pytorch-optimizer",
    "foreach": "hand-written `torch._foreach`, base with `fused=True`",
    "foreach-compiled": "that under `torch.compile`",
    "plain": "the plain base with `fused=True`: no SAM at all",
}


def blocks(
    results: Path = RESULTS / "cpu-step.csv", memory: Path = RESULTS / "cpu-training-memory.csv"
) -> dict[str, str]:
    """Return the text of every marked block of the README.

    Args:
        results: The result file of the step benchmark.
        memory: That of the memory of training steps.
    """
    rows = read_rows(results)
    return {
        "headline": _headline(rows),
        "figures": _figures(rows),
        "training memory": memory_summary(read_rows(memory)),
    }


def method_blocks(results: Path = RESULTS / "cpu-methods.csv") -> dict[str, str]:
    """Return the text of the marked blocks of docs/methods.md that come from a benchmark.

    Args:
        results: The result file of the benchmark of the methods.
    """
    return {"speed": summary(read_rows(results))}


def filled(text: str, contents: Mapping[str, str]) -> str:
    """Return ``text`` with every block between ``<!-- name -->`` and ``<!-- end -->`` replaced.

    Raises:
        ValueError: A block has no markers.
    """
    for name, content in contents.items():
        start, end = f"<!-- {name} -->\n", "\n<!-- end -->"
        before, marker, rest = text.partition(start)
        rest = rest if rest.startswith("\n") else "\n" + rest  # an empty block has one line break
        if not marker or end not in rest:
            raise ValueError(f"the text has no markers <!-- {name} --> ... <!-- end -->")
        text = before + start + content + rest[rest.index(end) :]
    return text


def _cells(rows: list[Row], base: str) -> dict[tuple[str, str], Row]:
    return {
        (row["contender"], row["shapes"]): row
        for row in rows
        if row["operation"] == "step" and row["base"] == base
    }


def _machine(rows: list[Row]) -> str:
    row = rows[0]
    return f"{row['device']}, torch {row['torch']}, float32, {row['date']}, `make bench`"


def _headline(rows: list[Row]) -> str:
    cells = _cells(rows, "AdamW")
    lists = [shapes for shapes in _lists(cells) if shapes != "2000x64"]

    def span(contender: str) -> str:
        ratios = [float(cells[contender, shapes]["ratio_to_ours"]) for shapes in lists]
        return f"{min(ratios):.2f} to {max(ratios):.2f}"

    plain = [float(cells["wsam_fused", shapes]["ratio_to_plain"]) for shapes in lists]
    return (
        f"A WSAM step over AdamW takes {min(plain):.2f} to {max(plain):.2f} times as long as plain "
        f"`AdamW(fused=True)`; its authors' formulation takes {span('authors')} times as long as "
        f"ours, a hand-written `torch._foreach` version {span('foreach')} times "
        f"({', '.join(lists)}; {_machine(rows)})."
    )


def _lists(cells: Mapping[tuple[str, str], Row]) -> list[str]:
    return list(dict.fromkeys(shapes for _, shapes in cells))


def _figures(rows: list[Row]) -> str:
    parts = [f"Time of one optimizer step divided by ours, in the same run ({_machine(rows)}):"]
    for base in ("AdamW", "SGDM"):
        cells = _cells(rows, base)
        lists = _lists(cells)
        lines = [f"| WSAM over {base} | {' | '.join(lists)} |", "|---|" + "---:|" * len(lists)]
        for contender, label in _OTHERS.items():
            found = [_ratio(cells.get((contender, shapes))) for shapes in lists]
            lines.append(f"| {label} | {' | '.join(found)} |")
        shares = [float(cells["wsam_fused", shapes]["share_of_stream"]) for shapes in lists]
        lines.append(
            "| *ours: share of an in-place loop's bandwidth* | "
            + " | ".join(f"{share:.0%}" for share in shares)
            + " |"
        )
        parts.append("\n".join(lines))
    missed = [outcome for outcome in outcomes(rows) if outcome.verdict != "reached"]
    lines = [f"* {o.shapes}: {o.wanted}; measured {o.measured} ({o.verdict})" for o in missed]
    parts.append("Wanted and not shown by this run:\n\n" + "\n".join(lines))
    return "\n\n".join(parts)


def _ratio(row: Row | None) -> str:
    if row is None:
        return "not measured"
    return f"{float(row['ratio_to_ours']):.2f}" if row["ratio_to_ours"] else row["note"]


def main() -> None:
    """Rewrite the blocks."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    for path, contents in ((README, blocks()), (METHODS, method_blocks())):
        path.write_text(filled(path.read_text(), contents))


if __name__ == "__main__":
    main()
