"""Render the result file of the step benchmark as Markdown and as a plot.

    python -m benchmarks.report [FILE.csv ...]

Every number comes from the file.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.checks import outcomes
from benchmarks.common import QUIET_SHARE, RESULTS, Row, read_rows

_HEADER = (
    "contender",
    "median ms",
    "p20 to p80",
    "min to max",
    "time / ours",
    "time / plain",
    "GB/s",
    "of stream",
    "moved",
    "compile s",
    "extra memory",
    "in state_dict",
)
_EXPLANATION = """\
Times are of one step without the passes through a model. The ratios are medians over rounds of the
quotient inside a round; compare them and not milliseconds, the speed of a shared machine drifts.
`moved`: float32 elements read and written per parameter, counted from the operations; GB/s follow
from it. `of stream`: those GB/s over the GB/s of `buffer.mul_` in the same round. `extra memory`:
peak above that of `plain` with its one gradient list, in copies of all parameters; `in state_dict`:
likewise what a checkpoint holds. `plain` is the base optimizer alone, `fused=True`."""


def render(path: Path) -> str:
    """Write the Markdown and the plot beside a result file.

    Args:
        path: The CSV file.

    Returns:
        The Markdown.

    Raises:
        ValueError: The file has no rows.
    """
    rows = read_rows(path)
    if not rows:
        raise ValueError(f"{path} has no rows; run python -m benchmarks.bench_step before")
    plot = path.with_suffix(".png")
    parts = ["# One optimizer step of WSAM", _caption(rows), f"![times]({plot.name})"]
    parts += [_EXPLANATION, "## What is wanted", _check_table(rows), "## What was measured"]
    for shapes, base in _cases(rows):
        parts.append(_case_title(rows, shapes, base))
        parts.append(_case_table(rows, shapes, base))
    markdown = "\n\n".join(parts) + "\n"
    path.with_suffix(".md").write_text(markdown)
    _plot(rows, plot)
    return markdown


def _caption(rows: Sequence[Row]) -> str:
    def values(field: str) -> str:
        return ", ".join(dict.fromkeys(row[field] for row in rows))

    commands = "; ".join(f"`{command}`" for command in dict.fromkeys(r["command"] for r in rows))
    return (
        f"WSAM, decoupled, {values('dtype')}, on {values('device')}; torch {values('torch')}; "
        f"commit {values('git')}, sources {values('source')}; {values('date')}; "
        f"{values('rounds')} rounds; {commands}."
    )


def _cases(rows: Iterable[Row]) -> list[tuple[str, str]]:
    return list(dict.fromkeys((row["shapes"], row["base"]) for row in rows))


def _select(rows: Iterable[Row], shapes: str, base: str, operation: str = "step") -> list[Row]:
    wanted = (shapes, base, operation)
    return [row for row in rows if (row["shapes"], row["base"], row["operation"]) == wanted]


def _case_title(rows: Sequence[Row], shapes: str, base: str) -> str:
    first = _select(rows, shapes, base)[0]
    stream = _select(rows, shapes, base, "stream")[0]
    return (
        f"### {shapes}, {base}\n\n{first['tensors']} tensors, {int(first['parameters']):,} "
        f"parameters; streaming {stream['gb_per_s']} GB/s over {int(stream['parameters']):,} "
        f"elements; other processes used {100 * float(stream['others_cpu']):.1f} % of the cores."
    ) + _warning(stream)


def _warning(stream: Row) -> str:
    if float(stream["others_cpu"]) <= QUIET_SHARE:
        return ""
    return "\n\n**The machine was busy: these numbers measure the scheduler. Run them again.**"


def _case_table(rows: Sequence[Row], shapes: str, base: str) -> str:
    lines = []
    for row in sorted(_select(rows, shapes, base), key=_slowness, reverse=True):
        if row["note"]:
            lines.append([row["contender"], row["note"], *[""] * (len(_HEADER) - 2)])
            continue
        lines.append(
            [
                row["contender"],
                row["median_ms"],
                f"{row['p20_ms']} to {row['p80_ms']}",
                f"{row['min_ms']} to {row['max_ms']}",
                _rounded(row["ratio_to_ours"], 2),
                _rounded(row["ratio_to_plain"], 2),
                _rounded(row["gb_per_s"], 1),
                f"{100 * float(row['share_of_stream']):.0f} %",
                row["moved_per_parameter"],
                _rounded(row["compile_s"], 1),
                _rounded(row["peak_extra_copies"], 2),
                _rounded(row["state_extra_copies"], 2),
            ]
        )
    return table(_HEADER, lines)


def _slowness(row: Row) -> float:
    return float(row["median_ms"]) if row["median_ms"] else float("inf")


def _check_table(rows: Sequence[Row]) -> str:
    lines = [list(outcome) for outcome in outcomes(rows)]
    if not lines:
        return "None of the shape lists that have wanted values was measured."
    return table(("shapes (AdamW)", "wanted of wsam_fused", "measured", ""), lines)


def _rounded(cell: str, digits: int) -> str:
    # 0.0 + turns a negative zero into zero
    return f"{0.0 + round(float(cell), digits):.{digits}f}" if cell else ""


def _short(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio < 10 else f"{ratio:.0f}"


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Render a Markdown table whose columns are aligned."""
    widths = [max(len(line[i]) for line in [header, *lines]) for i in range(len(header))]

    def join(line: Sequence[str]) -> str:
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        return "| " + " | ".join(cells) + " |"

    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([join(header), rule, *map(join, lines)])


def _plot(rows: Sequence[Row], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps = [row for row in rows if row["operation"] == "step" and row["ratio_to_ours"]]
    if not steps:
        return
    shapes = list(dict.fromkeys(row["shapes"] for row in steps))
    bases = list(dict.fromkeys(row["base"] for row in steps))
    names = list(dict.fromkeys(row["contender"] for row in steps))[::-1]
    figure, axes = pyplot.subplots(
        1, len(shapes), figsize=(3.6 + 2.9 * len(shapes), 4.2), sharey=True, squeeze=False
    )
    height = 0.8 / len(bases)
    for axis, list_name in zip(axes[0], shapes, strict=True):
        for k, base in enumerate(bases):
            cells = {row["contender"]: row for row in _select(steps, list_name, base)}
            shown = [name for name in names if name in cells]
            places = [names.index(name) - 0.4 + height * (k + 0.5) for name in shown]
            ratios = [float(cells[name]["ratio_to_ours"]) for name in shown]
            bars = axis.barh(places, ratios, height, label=base, color=f"C{k}")
            axis.bar_label(bars, [_short(ratio) for ratio in ratios], padding=2, fontsize=7)
        axis.axvline(1.0, color="black", linewidth=0.8)
        axis.set_xscale("log")
        axis.margins(x=0.18)
        axis.set_title(list_name, fontsize=10)
        axis.set_yticks(range(len(names)), names)
    axes[0][0].legend(fontsize=8, loc="lower right")
    row = steps[0]
    figure.supxlabel(
        f"time of one step / time of wsam_fused\n{row['dtype']}, {row['device']}, "
        f"torch {row['torch']}, {row['date']}",
        fontsize=9,
    )
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main() -> None:
    """Render the files given, or the one of the CPU."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path, default=[RESULTS / "cpu-step.csv"])
    for path in parser.parse_args().files:
        print(render(path))


if __name__ == "__main__":
    main()
