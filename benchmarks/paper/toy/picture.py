"""The picture of the toy example: the loss as a landscape, and the paths through it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm, LinearSegmentedColormap
from matplotlib.contour import ContourSet
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke

from benchmarks.paper.toy import loss as toy_loss
from benchmarks.paper.toy.paths import START, Array

# Colours that the colour-blind can tell apart (Okabe and Ito), on a grey landscape; the ends have
# markers of their own.
_LOOKS = (
    ("#56b4e9", "s"),
    ("#009e73", "^"),
    ("#f0e442", "v"),
    ("#d55e00", "D"),
    ("#cc79a7", "o"),
)
_MU, _SIGMA = (-34.0, 34.0), (4.0, 44.0)
# Around the sharp minimum, where most paths end.
_ZOOM_MU, _ZOOM_SIGMA = (-18.6, -14.6), (11.3, 14.4)
# Even steps in the basins, which are shallow, then ever wider ones: the walls are high.
_LEVELS = (*np.arange(0.28, 0.425, 0.01), 0.44, 0.46, 0.49, 0.53, 0.58, 0.65, 0.75, 0.9, 1.1)
_TICKS = (0.28, 0.32, 0.36, 0.40, 0.46, 0.58, 0.9)


def draw(paths: Mapping[str, Array]) -> Figure:
    """Draw the landscape with the paths, and the loss along them.

    Args:
        paths: Of each optimizer, an array of shape [steps + 1, 2].
    """
    figure = Figure(figsize=(9.6, 5.4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(2.3, 1.0))
    _landscape(figure, left)
    looks = dict(zip(paths, _LOOKS, strict=True))
    # The longest first: those that soon settle would be hidden below it.
    lengths = {name: np.abs(np.diff(path, axis=0)).sum() for name, path in paths.items()}
    ordered = {name: paths[name] for name in sorted(paths, key=lambda name: -lengths[name])}
    for name, path in ordered.items():
        _path(left, path, *looks[name])
    _zoom(left, ordered, looks)
    left.plot(*START, marker="*", markersize=15, color="white", markeredgecolor="black", zorder=6)
    handles = [
        Line2D([], [], color=colour, marker=marker, markeredgecolor="black", lw=2.2, label=name)
        for name, (colour, marker) in looks.items()
    ]
    handles.append(
        Line2D([], [], ls="", marker="*", ms=11, mfc="white", mec="black", label="start")
    )
    left.legend(
        handles=handles,
        loc="lower right",
        framealpha=0.9,
        fontsize=8.5,
        title=r"optimizer, $\gamma$",
        title_fontsize=8.5,
    )
    _losses(right, paths, looks)
    return figure


def _landscape(figure: Figure, axes: Axes) -> None:
    filled = _contours(axes, _MU, _SIGMA)
    bar = figure.colorbar(filled, ax=axes, location="bottom", aspect=45, pad=0.02, ticks=_TICKS)
    bar.set_label("loss", fontsize=9)
    places = {toy_loss.FLAT: (24.0, 37.0), toy_loss.SHARP: (-25.5, 5.5)}
    for minimum in toy_loss.minima().values():
        axes.annotate(
            f"{minimum.name} minimum\nloss {minimum.loss:.3f}",
            (minimum.mu, minimum.sigma),
            xytext=places[minimum.name],
            fontsize=9,
            ha="center",
            va="bottom",
            arrowprops={"arrowstyle": "-", "color": "black", "lw": 0.8},
            bbox={"boxstyle": "round,pad=0.25", "fc": "white", "ec": "#888888"},
            zorder=7,
        )
    axes.set(xlim=_MU, ylim=_SIGMA, xlabel=r"$\mu$", ylabel=r"$\sigma$")
    axes.set_title("Paths on the loss surface", loc="left", fontsize=10)


def _contours(
    axes: Axes, mu_range: tuple[float, float], sigma_range: tuple[float, float]
) -> ContourSet:
    mu, sigma = np.meshgrid(np.linspace(*mu_range, 341), np.linspace(*sigma_range, 281))
    lowest = min(minimum.loss for minimum in toy_loss.minima().values())
    levels = [lowest, *_LEVELS]
    loss = toy_loss.loss(mu, sigma)
    # Without the darkest part, where neither lines nor letters would be seen.
    colours = LinearSegmentedColormap.from_list(
        "light bone", colormaps["bone_r"](np.linspace(0.0, 0.8, 256))
    )
    norm = BoundaryNorm(levels, 256)
    filled = axes.contourf(mu, sigma, loss, levels, cmap=colours, norm=norm)
    axes.contour(mu, sigma, loss, levels, colors="white", linewidths=0.4, alpha=0.6)
    for minimum in toy_loss.minima().values():
        at = (minimum.mu, minimum.sigma)
        axes.plot(*at, marker="+", markersize=11, color="black", markeredgewidth=1.8, zorder=7)
    return filled


def _zoom(
    landscape: Axes, paths: Mapping[str, Array], looks: Mapping[str, tuple[str, str]]
) -> None:
    axes = landscape.inset_axes((0.015, 0.585, 0.40, 0.40))
    _contours(axes, _ZOOM_MU, _ZOOM_SIGMA)
    for name, path in paths.items():
        _path(axes, path, *looks[name], width=0.9, size=6.0)
    axes.set(xlim=_ZOOM_MU, ylim=_ZOOM_SIGMA, xticks=[], yticks=[])
    landscape.indicate_inset_zoom(axes, edgecolor="black", alpha=0.8)


def _path(
    axes: Axes, path: Array, colour: str, marker: str, width: float = 1.5, size: float = 8.0
) -> None:
    outline = withStroke(linewidth=width + 1.5, foreground="black", alpha=0.55)
    axes.plot(path[:, 0], path[:, 1], color=colour, lw=width, path_effects=[outline], zorder=4)
    end = {"marker": marker, "markersize": size, "markeredgecolor": "black"}
    axes.plot(*path[-1], color=colour, **end, zorder=6)


def _losses(axes: Axes, paths: Mapping[str, Array], looks: Mapping[str, tuple[str, str]]) -> None:
    for name, path in paths.items():
        axes.plot(toy_loss.loss(path[:, 0], path[:, 1]), color=looks[name][0], lw=1.5)
    for minimum in toy_loss.minima().values():
        axes.axhline(minimum.loss, color="black", lw=0.8, ls=":")
        axes.annotate(
            minimum.name,
            (1.0, minimum.loss),
            xycoords=("axes fraction", "data"),
            xytext=(3, 0),
            textcoords="offset points",
            va="center",
        )
    axes.set(xlabel="step")
    axes.set_title("Loss along the path", loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
