"""Pictures of comparisons."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.paper.statistics import half_width

# Colours that the colour-blind can tell apart (Okabe, Ito), the same for a method everywhere.
COLOURS = {
    "SGDM": "#666666",
    "SAM": "#0072b2",
    "ESAM": "#56b4e9",
    "GSAM": "#009e73",
    "WSAM": "#d55e00",
    "Coupled-WSAM": "#e69f00",
    "BSAM": "#cc79a7",
    "RW-SAM": "#8c6d00",
}
_OTHER = "#444444"
_GRID = "#e6e6e6"


def plain(axes: Axes) -> None:
    """Take away what a picture does not need."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color=_GRID, linewidth=0.6)
    axes.set_axisbelow(True)


def intervals(
    panels: Mapping[str, Mapping[str, Sequence[float]]], label: str, title: str
) -> Figure:
    """Return a picture with a panel for each group: every seed, the mean and its interval.

    Args:
        panels: Values by group and method.
        label: Of the values.
        title: Of the picture.
    """
    height = 1.0 + 0.36 * max(map(len, panels.values()))
    columns = min(len(panels), 2 if len(panels) == 4 else 3)
    rows = -(-len(panels) // columns)
    size = (1.2 + 3.6 * columns, 0.5 + height * rows)
    figure = Figure(figsize=size, dpi=130, layout="constrained")
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    for axes, (group, values) in zip(grid, panels.items(), strict=False):
        names = list(values)
        for place, name in enumerate(names):
            _interval(axes, place, name, values[name])
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_title(group, loc="left", fontsize=10, color="#444444")
        axes.set_xlabel(label)
        plain(axes)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12)
    return figure


def _interval(axes: Axes, place: int, name: str, values: Sequence[float]) -> None:
    colour = COLOURS.get(name, _OTHER)
    # Equal values would hide each other: errors on few test samples often are.
    spread = np.linspace(-0.16, 0.16, len(values))
    axes.scatter(values, place + spread, s=12, color=colour, alpha=0.35, linewidths=0)
    mean, width = statistics.mean(values), half_width(values)
    axes.errorbar(mean, place, xerr=width, fmt="o", color=colour, capsize=3, markersize=6)


def curves(
    panels: Mapping[str, Mapping[str, Mapping[float, Sequence[float]]]],
    x_label: str,
    y_label: str,
    title: str,
) -> Figure:
    """Return a picture with a panel for each group: means over seeds with their intervals.

    Args:
        panels: By group and curve, the values of all seeds by place on the x axis.
        x_label: Of that axis.
        y_label: Of the values.
        title: Of the picture.
    """
    size = (0.8 + 4.4 * len(panels), 4.0)
    figure = Figure(figsize=size, dpi=130, layout="constrained")
    grid = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (group, lines) in zip(grid, panels.items(), strict=True):
        for name, line in lines.items():
            places = list(line)
            means = np.array([statistics.mean(values) for values in line.values()])
            widths = np.array([half_width(values) for values in line.values()])
            colour = COLOURS.get(name, _OTHER)
            axes.plot(places, means, color=colour, marker="o", markersize=4, label=name)
            axes.fill_between(
                places, means - widths, means + widths, color=colour, alpha=0.15, linewidth=0
            )
        axes.set_title(group, loc="left", fontsize=10, color="#444444")
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        if len(lines) > 1:
            axes.legend(frameon=False)
        plain(axes)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12)
    return figure
