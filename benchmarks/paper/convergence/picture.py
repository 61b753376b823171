"""The picture of the convergence experiment: regret and gradients beside their bounds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

# Colours that the colour-blind can tell apart (Okabe and Ito), with markers for print.
_LOOKS = (
    ("#0072b2", "o"),
    ("#009e73", "s"),
    ("#d55e00", "^"),
    ("#e69f00", "v"),
    ("#cc79a7", "D"),
    ("#56b4e9", "P"),
)
_GUIDE = "#555555"


@dataclass(frozen=True)
class Curve:
    """What was found with one setting.

    Attributes:
        label: In the legend.
        steps: T of each value.
        low: Lower end of a band.
        values: Found.
        high: Upper end of the band.
        bounds: Of the theorem.
    """

    label: str
    steps: Sequence[int]
    low: Sequence[float]
    values: Sequence[float]
    high: Sequence[float]
    bounds: Sequence[float]


def draw(regrets: Sequence[Curve], gradients: Sequence[Curve]) -> Figure:
    """Draw both panels.

    Args:
        regrets: Of the convex problem.
        gradients: Squared norms, of the problem that is not convex.
    """
    figure = Figure(figsize=(9.6, 5.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    _panel(left, regrets, np.sqrt, r"$\propto\sqrt{T}$")
    left.set_title("Regret, convex; bands: all seeds", loc="left", fontsize=10)
    _panel(right, gradients, lambda t: np.log(t) / np.sqrt(t), r"$\propto\log T/\sqrt{T}$")
    title = r"Least mean $\|\nabla L(w_t)\|^2$, not convex; bands: up to the average"
    right.set_title(title, loc="left", fontsize=10)
    return figure


def _panel(
    axes: Axes,
    curves: Sequence[Curve],
    rate: Callable[[np.ndarray], np.ndarray],
    rate_label: str,
) -> None:
    for curve, (colour, marker) in zip(curves, _LOOKS, strict=False):
        look = {"color": colour, "marker": marker, "markersize": 3.5}
        axes.plot(curve.steps, curve.values, label=curve.label, lw=1.5, **look)
        axes.fill_between(curve.steps, curve.low, curve.high, color=colour, alpha=0.2, lw=0)
        axes.plot(curve.steps, curve.bounds, color=colour, lw=1.0, ls="--")
    steps = np.array(curves[0].steps, float)
    middle = len(steps) // 2
    # Between the curves and the bounds, where it crosses neither.
    height = (max(c.values[middle] for c in curves) * min(c.bounds[middle] for c in curves)) ** 0.5
    guide = rate(steps) * height / rate(steps)[middle]
    axes.plot(steps, guide, color=_GUIDE, lw=1.2, ls=":", label=rate_label)
    axes.plot([], [], color=_GUIDE, lw=1.0, ls="--", label="bound (same colour)")
    axes.set(xscale="log", yscale="log", xlabel="steps T")
    # Short runs would have labels between the powers of ten, on top of each other.
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(True, which="major", color="#e6e6e6", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2)
