"""How the demonstration shows what it found: plain-text tables and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from benchmarks.demo_model import SHARPNESS_RHO, History

# Colours that the colour-blind can tell apart; the markers tell them apart in print.
_LOOKS = {"SGDM": ("#666666", "o"), "SAM": ("#0072b2", "s")}
_OTHER_LOOKS = [("#d55e00", "^"), ("#009e73", "v"), ("#cc79a7", "D"), ("#e69f00", "P")]


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; all columns but the first are aligned to the right."""
    widths = [max(len(row[i]) for row in (headers, *rows)) for i in range(len(headers))]

    def line(cells: Sequence[str]) -> str:
        padded = [cells[0].ljust(widths[0])]
        padded += [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
        return f"| {' | '.join(padded)} |"

    rule = "|".join([":" + "-" * (widths[0] + 1)] + ["-" * (w + 1) + ":" for w in widths[1:]])
    return "\n".join([line(headers), f"|{rule}|", *map(line, rows)])


def results_table(histories: Sequence[History]) -> str:
    """Return the table of the training runs with its caption."""
    headers = (
        "method",
        "test accuracy",
        "training loss",
        "sharpness",
        "step, ms",
        "optimizer, ms",
        "backend",
    )
    rows = [
        (
            run.method,
            f"{run.test_accuracy[-1]:.2%}",
            f"{run.train_loss[-1]:.5f}",
            f"{run.sharpness:.5f}",
            f"{run.timer.median_step() * 1e3:.2f}",
            f"{run.timer.median_optimizer() * 1e3:.3f}",
            run.backend,
        )
        for run in histories
    ]
    caption = f"""\
training loss  L(w) on the whole training set after the last epoch, in eval mode
sharpness      L(w + e) - L(w) on the same images, also in eval mode, with
               e = {SHARPNESS_RHO:g} grad L(w) / |grad L(w)| whatever the method
step           median time of a training step, with all evaluations of the gradient
optimizer      the part of it that is not the model's; SGDM is torch.optim.SGD, and the base
               optimizer of the others; m-SAM adds up gradients within the backward, which
               counts as the model's"""
    return f"{table(headers, rows)}\n\n{caption}"


def _panel(axes: Axes, histories: Sequence[History], name: str, title: str, legend_at: str) -> None:
    others = cycle(_OTHER_LOOKS)
    for run in histories:
        values = getattr(run, name)
        colour, marker = _LOOKS.get(run.method) or next(others)
        epochs = range(1, len(values) + 1)
        axes.plot(epochs, values, color=colour, marker=marker, markersize=3.5, label=run.method)
    axes.set_title(title, loc="left", fontsize=10, color="#444444")
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(True, which="both", color="#e6e6e6", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc=legend_at)


def save_curves(histories: Sequence[History], path: Path, title: str) -> None:
    """Draw the training loss and the test accuracy per epoch into a PNG."""
    figure = Figure(figsize=(9.6, 4.2), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    _panel(left, histories, "train_loss", "Loss on the training set (eval mode)", "upper right")
    left.set_yscale("log")
    _panel(right, histories, "test_accuracy", "Accuracy on the test set", "lower right")
    lowest = min(run.test_accuracy[len(run.test_accuracy) // 5] for run in histories)
    # The first epochs would flatten the rest; they run out of the picture at the bottom.
    right.set_ylim(max(0.0, 1.0 - 1.6 * max(1.0 - lowest, 0.01)), 1.0)
    right.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=1))
    figure.suptitle(title, x=0.01, ha="left", fontsize=12)
    figure.savefig(path, format="png")
