"""A slice through the loss landscape, and its picture."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from wsam_fused.arguments import whole_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True, eq=False)
class LossSlice:
    """The loss along one direction or in the plane of two, in float64 on the CPU.

    Attributes:
        coordinates: Shape [points]: factors of the direction, or of each of the two; 0 is at w.
        losses: Shape [points]: the loss at w + coordinates[i] d; or [points, points]: the loss at
            w + coordinates[i] d0 + coordinates[j] d1. May be infinite or NaN.
    """

    coordinates: Tensor
    losses: Tensor

    def plot(self, axes: Axes | None = None, *, label: str | None = None, levels: int = 24) -> Axes:
        """Draw a line, or filled contours with a colour bar and a cross at w.

        Colours are on a logarithmic scale if all losses are positive, else on a linear one. What is
        not finite is left blank.

        Args:
            axes: Where to draw; by default the axes of a new figure, which pyplot does not know:
                ``slice.plot().figure.savefig("slice.png")``.
            label: Of the line in a legend, or of the colour bar ("loss" by default).
            levels: How many contours, >= 2.

        Returns:
            The axes.

        Raises:
            ValueError: ``levels`` is too small, or no loss is finite.
            ImportError: There is no matplotlib.
        """
        levels = whole_number("levels", levels, 2)
        if not bool(torch.isfinite(self.losses).any()):
            raise ValueError("losses has no finite element, expected one at least to draw")
        axes = _new_axes() if axes is None else axes
        if self.losses.dim() == 1:
            finite = torch.where(self.losses.isfinite(), self.losses, torch.nan)
            axes.plot(self.coordinates.numpy(), finite.numpy(), label=label)
            axes.axvline(0.0, color="#999999", linewidth=0.8, linestyle=":")
            axes.set_xlabel("coordinate along the direction")
            axes.set_ylabel("loss")
        else:
            self._draw_contours(axes, label or "loss", levels)
        return axes

    def _draw_contours(self, axes: Axes, label: str, count: int) -> None:
        from matplotlib.colors import LogNorm, Normalize
        from matplotlib.ticker import LogFormatterMathtext, LogLocator, MaxNLocator, ScalarFormatter

        finite = self.losses[self.losses.isfinite()]
        low, high = float(finite.min()), float(finite.max())
        logarithmic = low > 0.0
        # A range that rounding would make empty has no contours.
        if high - low <= 1e-9 * max(abs(low), abs(high)):
            margin = 0.01 * max(abs(low), abs(high)) or 0.01
            low, high = low - margin, high + margin
        if logarithmic:
            edges = torch.linspace(math.log(low), math.log(high), count, dtype=torch.float64).exp()
        else:
            edges = torch.linspace(low, high, count, dtype=torch.float64)
        edges[0], edges[-1] = low, high  # exactly: what lies outside is not drawn
        norm = (LogNorm if logarithmic else Normalize)(low, high)
        values = torch.where(self.losses.isfinite(), self.losses, torch.nan)
        shown: Any = axes.contourf(
            self.coordinates.numpy(),
            self.coordinates.numpy(),
            values.T.numpy(),  # the first direction to the right
            levels=edges.tolist(),
            norm=norm,
            cmap="viridis",
        )
        figure = axes.get_figure(root=False)
        assert figure is not None  # all axes that can be drawn on are in one
        bar = figure.colorbar(shown, ax=axes, label=label)
        if not logarithmic or high < 100 * low:  # too narrow for several powers of ten
            bar.locator = MaxNLocator(6)
            bar.formatter = ScalarFormatter(useOffset=False)
            bar.minorticks_off()
        else:
            bar.locator = LogLocator()
            bar.formatter = LogFormatterMathtext()
        axes.plot([0.0], [0.0], marker="+", color="white", markersize=10, markeredgewidth=1.5)
        axes.set_xlabel("coordinate along direction 0")
        axes.set_ylabel("coordinate along direction 1")


def _new_axes() -> Axes:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "plots of loss slices need matplotlib: pip install matplotlib, or wsam_fused[landscape]"
        ) from error
    return Figure(figsize=(5.6, 4.2), dpi=150, layout="constrained").add_subplot()
