"""The tables of the long runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from benchmarks.common import Row

Cells = Mapping[tuple[str, str, str, str], str]


def tables(rows: Sequence[Row]) -> dict[str, str]:
    """Return the Markdown of every part that was measured, by the name of its block."""
    makers = {"growth": _growth, "walk": _walk, "training": _training}
    parts = {part: [row for row in rows if row["part"] == part] for part in makers}
    return {
        f"long: {part}": makers[part](found) + "\n\n" + _source(found)
        for part, found in parts.items()
        if found
    }


def _source(rows: Sequence[Row]) -> str:
    one = rows[0]
    return f"({one['device']}, torch {one['torch']}, {one['date']}, `{one['command']}`)"


def _cells(rows: Iterable[Row]) -> Cells:
    return {(row["case"], row["steps"], row["of"], row["quantity"]): row["value"] for row in rows}


def _unique(rows: Iterable[Row], field: str) -> list[str]:
    return list(dict.fromkeys(row[field] for row in rows))


def _growth(rows: Sequence[Row]) -> str:
    cells = _cells(rows)
    lines = [
        "| training | steps | resident memory, 4 KiB pages | files | tensors | objects | entries |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for case in _unique(rows, "case"):
        steps = _unique((row for row in rows if row["case"] == case), "steps")
        for step in (steps[0], steps[1], steps[len(steps) // 2], steps[-1]):
            names = ("resident", "files", "tensors", "objects", "entries")
            values = " | ".join(cells[case, step, "", name] for name in names)
            lines.append(f"| {case} | {_number(step)} | {values} |")
    return "\n".join(lines)


def _walk(rows: Sequence[Row]) -> str:
    cells = _cells(rows)
    lines = [
        "| kept as | size of w | steps | moved | typically | farthest | random walk |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for case in _unique(rows, "case"):
        here = [row for row in rows if row["case"] == case]
        steps = _unique(here, "steps")
        if all(float(cells[case, s, of, "farthest"]) == 0 for s in steps for of in _sizes(here)):
            lines.append(f"| {case} | all | {_number(steps[-1])} | 0 % | 0 | 0 | |")
            continue
        for of in _sizes(here):
            for step in dict.fromkeys((*steps[2:-1:2], steps[-1])):
                moved = float(cells[case, step, of, "moved"])
                expected = cells.get((case, step, of, "expected"), "")
                lines.append(
                    f"| {case} | {float(of):g} | {_number(step)} | {moved:.0%} "
                    f"| {_short(cells[case, step, of, 'typical'])} "
                    f"| {_short(cells[case, step, of, 'farthest'])} | {_short(expected)} |"
                )
    return "\n".join(lines)


def _sizes(rows: Iterable[Row]) -> list[str]:
    return _unique(rows, "of")


def _training(rows: Sequence[Row]) -> str:
    cells = _cells(rows)
    lines = [
        "| gradients | steps | recomputed from copied, typically | farthest "
        "| float32 from float64, typically |",
        "|---|---:|---:|---:|---:|",
    ]
    for case in _unique(rows, "case"):
        for step in _unique((row for row in rows if row["case"] == case), "steps"):
            names = ("typical", "farthest", "of_float32")
            values = " | ".join(_short(cells[case, step, "", name]) for name in names)
            lines.append(f"| {case} | {_number(step)} | {values} |")
    return "\n".join(lines)


def _number(steps: str) -> str:
    return f"{int(steps):,}"


def _short(value: str) -> str:
    return f"{float(value):,.3g}" if value else ""
