"""Slices, their directions and their pictures."""

from __future__ import annotations

import builtins
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from landscape_problems import DTYPES, Quadratic, batch, loss_of
from tolerances import LANDSCAPE, close
from torch import Tensor, nn

from wsam_fused.landscape import (
    LossSlice,
    direction_to,
    hessian_eigenpairs,
    loss_slice_1d,
    loss_slice_2d,
    random_direction,
)

SPECTRUM = torch.linspace(-0.2, 1.0, 12)
PNG = b"\x89PNG\r\n\x1a\n"


def along(model: Quadratic, seed: int) -> tuple[list[Tensor], Tensor]:
    """A direction, as the parameters and, of those in the loss, as one vector in float64."""
    generator = torch.Generator().manual_seed(seed)
    parts = [
        torch.randn(param.shape, generator=generator, dtype=torch.float64).to(param.dtype)
        for param in model.parameters()
        if param.requires_grad
    ]
    return parts, torch.cat([part.flatten() for part in parts[:2]]).double()


def convolutions() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(20, 4))


# ---- values --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("points", [2, 7, 8])
def test_line_through_a_quadratic(dtype: torch.dtype, points: int) -> None:
    model = Quadratic(SPECTRUM, dtype)
    parts, d = along(model, 1)
    w = model.exact()[0]
    found = loss_slice_1d(model, model.loss, parts, radius=0.5, points=points)
    assert found.coordinates.shape == found.losses.shape == (points,)
    assert found.coordinates.dtype == found.losses.dtype == torch.float64
    assert found.coordinates[[0, -1]].tolist() == [-0.5, 0.5]
    expected = torch.stack([model.at(w + c * d) for c in found.coordinates])
    close(found.losses, expected, LANDSCAPE[dtype], "losses")
    if points % 2:
        assert found.coordinates[points // 2] == 0.0
        assert found.losses[points // 2] == model.loss()  # bit by bit


@pytest.mark.parametrize("dtype", DTYPES)
def test_plane_through_a_quadratic(dtype: torch.dtype) -> None:
    model = Quadratic(SPECTRUM, dtype)
    (first, d0), (second, d1) = along(model, 1), along(model, 2)
    w = model.exact()[0]
    found = loss_slice_2d(model, model.loss, [first, second], radius=0.5, points=5)
    assert found.coordinates.tolist() == [-0.5, -0.25, 0.0, 0.25, 0.5]
    expected = [
        [model.at(w + a * d0 + b * d1).item() for b in found.coordinates] for a in found.coordinates
    ]
    close(found.losses, torch.tensor(expected, dtype=torch.float64), LANDSCAPE[dtype], "losses")
    assert found.losses[2, 2] == model.loss()


def test_default_directions() -> None:
    torch.manual_seed(1)
    model, (x, y) = nn.Linear(4, 2).double(), batch()
    loss = loss_of(model, x.double(), y.double())
    own = [random_direction(model, seed) for seed in (3, 4)]
    line = loss_slice_1d(model, loss, points=5, seed=3)
    assert torch.equal(line.losses, loss_slice_1d(model, loss, own[0], points=5).losses)
    plane = loss_slice_2d(model, loss, points=3, seed=3)
    assert torch.equal(plane.losses, loss_slice_2d(model, loss, own, points=3).losses)
    assert not torch.equal(line.losses, loss_slice_1d(model, loss, points=5, seed=4).losses)


def test_batches_are_the_whole() -> None:
    torch.manual_seed(1)
    model, (x, y) = nn.Linear(4, 2).double(), batch()
    x, y = x.double(), y.double()
    parts = [loss_of(model, *pair) for pair in zip(x.chunk(4), y.chunk(4), strict=True)]
    whole = loss_slice_1d(model, loss_of(model, x, y), points=5)
    close(loss_slice_1d(model, parts, points=5).losses, whole.losses, LANDSCAPE[x.dtype], "losses")


def test_an_eigenvector_is_a_direction() -> None:
    model = Quadratic(SPECTRUM, torch.float64)
    found = hessian_eigenpairs(model, model.loss)
    line = loss_slice_1d(model, model.loss, found.eigenvectors[0], radius=0.1, points=3)
    curvature = (line.losses[0] - 2 * line.losses[1] + line.losses[2]) / 0.1**2
    # Losses of the size of 10, off by 45 u of that each, over 0.01.
    assert curvature.item() == pytest.approx(found.eigenvalues.item(), abs=4 * 45 * 1e-15 * 100)


def test_losses_may_be_infinite() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    line = loss_slice_1d(
        model, lambda: torch.log(model.weight).sum(), [torch.ones(1, 1)], points=3, radius=2.0
    )
    assert line.losses[0].isnan()
    line = loss_slice_1d(model, lambda: torch.log(model.weight).sum(), [torch.ones(1, 1)], points=3)
    assert line.losses[0] == -torch.inf


# ---- directions ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_filters_of_a_random_direction_have_the_norms_of_the_model(dtype: torch.dtype) -> None:
    model = convolutions().to(dtype)
    with torch.no_grad():
        model[0].weight[2] = 0.0
    direction = random_direction(model, 5)
    for part, param in zip(direction, model.parameters(), strict=True):
        assert (part.shape, part.dtype) == (param.shape, param.dtype)
        if param.dim() < 2:
            assert not part.any()
        else:
            norms = [tensor.detach().flatten(1).double().norm(dim=1) for tensor in (part, param)]
            close(*norms, LANDSCAPE[dtype], "norms of filters")
    cosine = torch.cosine_similarity(direction[0].flatten(), model[0].weight.flatten(), 0)
    assert cosine.abs() < 0.5


def test_random_directions_follow_from_the_seed() -> None:
    model = convolutions()
    first = random_direction(model, 5)
    torch.manual_seed(99)
    assert all(map(torch.equal, first, random_direction(model, 5)))
    assert not torch.equal(first[0], random_direction(model, 6)[0])


def test_a_frozen_parameter_has_no_direction() -> None:
    model = convolutions()
    model[0].requires_grad_(False)
    assert [part.shape for part in random_direction(model)] == [
        param.shape for param in list(model.parameters())[2:]
    ]


@pytest.mark.parametrize("as_state", [False, True])
def test_the_way_to_another_minimum(as_state: bool) -> None:
    (x, y), models = batch(), []
    for seed in range(2):
        torch.manual_seed(seed)
        models.append(nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double())
    model, other = models
    x, y = x.double(), y.double()
    way = direction_to(model, other.state_dict() if as_state else other)
    line = loss_slice_1d(model, loss_of(model, x, y), way, points=3)
    ends = torch.stack([loss_of(each, x, y)() for each in models]).detach()
    close(line.losses[1:], ends, LANDSCAPE[x.dtype], "losses at both ends")
    assert (ends[0] - ends[1]).abs() > 1e-3


def test_the_way_between_models_with_tied_parameters() -> None:
    model, other = (nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)}) for _ in range(2))
    other["b"].weight = other["a"].weight
    way = direction_to(model, other)
    assert torch.equal(way[2], other["a"].weight - model["b"].weight)
    assert len(direction_to(other, model)) == 3


# ---- pictures ------------------------------------------------------------------------------------


def plane(losses: Tensor) -> LossSlice:
    return LossSlice(torch.linspace(-1, 1, len(losses), dtype=torch.float64), losses.double())


BOWL = torch.linspace(-1, 1, 9)[:, None] ** 2 + 3 * torch.linspace(-1, 1, 9)[None] ** 2
PICTURES = {
    "line": plane(BOWL[0]),
    "line with gaps": plane(BOWL[0].log()),
    "over a narrow range": plane(BOWL + 9.0),
    "over powers of ten": plane((4 * BOWL).exp()),
    "down to zero": plane(BOWL),
    "negative": plane(-BOWL - 1.0),
    "with a hole": plane(torch.where(BOWL > 3, torch.inf, BOWL + 0.1)),
    "constant": plane(torch.full((3, 3), 2.5)),
    "constant zero": plane(torch.zeros(3, 3)),
    "two points": plane(torch.tensor([[1.0, 2.0], [3.0, 4.0]])),
}


@pytest.fixture
def _matplotlib() -> None:
    pytest.importorskip("matplotlib", reason="it draws the pictures")


@pytest.mark.usefixtures("_matplotlib")
@pytest.mark.parametrize("name", PICTURES)
def test_pictures(name: str, tmp_path: Path) -> None:
    axes = PICTURES[name].plot()
    axes.figure.savefig(tmp_path / "slice.png")
    assert (tmp_path / "slice.png").read_bytes().startswith(PNG)
    assert axes.get_xlabel()
    if PICTURES[name].losses.dim() == 2:
        assert len(axes.figure.axes) == 2, "no colour bar"
        assert len(axes.collections) == 1, "no contours"
        assert axes.lines[0].get_xydata().tolist() == [[0.0, 0.0]]
    assert (
        "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()
    )


@pytest.mark.usefixtures("_matplotlib")
def test_colours_are_logarithmic_where_losses_are_positive() -> None:
    from matplotlib.colors import LogNorm

    norms = {
        name: PICTURES[name].plot().collections[0].norm
        for name in ("over powers of ten", "down to zero")
    }
    assert isinstance(norms["over powers of ten"], LogNorm)
    assert not isinstance(norms["down to zero"], LogNorm)


@pytest.mark.usefixtures("_matplotlib")
def test_the_first_direction_is_drawn_to_the_right() -> None:
    """Contours of a loss that depends on the first coordinate only are upright."""
    slope = torch.arange(5.0)[:, None].expand(5, 5) + 1
    contours = plane(slope).plot(levels=5).collections[0]
    lowest = contours.get_paths()[0].get_extents()
    assert lowest.height == pytest.approx(2.0)
    assert lowest.width < 1.0


@pytest.mark.usefixtures("_matplotlib")
def test_pictures_in_axes_that_are_given() -> None:
    from matplotlib.figure import Figure

    axes = Figure().add_subplot()
    assert PICTURES["line"].plot(axes, label="SAM") is axes
    assert PICTURES["line"].plot(axes, label="SGDM") is axes
    labels = [line.get_label() for line in axes.lines]
    assert {"SAM", "SGDM"} <= set(labels)
    assert axes.lines[0].get_ydata().tolist() == PICTURES["line"].losses.tolist()


def test_pictures_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == "matplotlib":
            raise ImportError(f"No module named {name!r}")
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        PICTURES["line"].plot()


def test_nothing_to_draw() -> None:
    with pytest.raises(ValueError, match="losses has no finite element"):
        plane(torch.full((3, 3), torch.inf)).plot()
    with pytest.raises(ValueError, match="levels is 1, expected a whole number >= 2"):
        plane(BOWL).plot(levels=1)
