"""The loss along one direction, or in the plane of two."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from wsam_fused.arguments import number, whole_number
from wsam_fused.autocast import forget_casts
from wsam_fused.landscape.as_found import as_found
from wsam_fused.landscape.directions import Direction, as_direction, random_direction
from wsam_fused.landscape.evaluation import Loss, loss_functions, mean_loss, trainable
from wsam_fused.landscape.loss_slice import LossSlice


def loss_slice_1d(
    model: nn.Module,
    loss: Loss | Sequence[Loss],
    direction: Direction | None = None,
    *,
    radius: float = 1.0,
    points: int = 41,
    seed: int = 0,
) -> LossSlice:
    """Return the loss at w + c d for c from -radius to radius.

    Losses are evaluated without a graph and may be infinite or NaN.

    Args:
        model: In the mode in which it shall be evaluated; see :mod:`wsam_fused.landscape`.
        loss: The mean loss, or one for each batch of equal size.
        direction: d, one tensor for each parameter that requires a gradient: an eigenvector of
            :func:`hessian_eigenpairs`, :func:`direction_to` another minimum, or by default
            ``random_direction(model, seed)``.
        radius: The largest c, > 0, in units of d.
        points: How many c, >= 2; an odd number has one at w.
        seed: Of the random direction, >= 0.

    Returns:
        Coordinates of shape [points] and losses of shape [points].

    Raises:
        TypeError: ``model`` is no module or has DTensors, ``loss`` is no function that returns a
            scalar tensor, or ``direction`` is no sequence of tensors.
        ValueError: An argument is out of its range, or ``direction`` does not fit the parameters.
    """
    functions = loss_functions("loss", loss)
    params: list[Tensor] = list(trainable(model).values())
    coordinates = _coordinates(radius, points)
    chosen = random_direction(model, seed) if direction is None else direction
    directions = [as_direction("direction", chosen, params)]
    return LossSlice(coordinates, _losses(model, functions, params, directions, coordinates))


def loss_slice_2d(
    model: nn.Module,
    loss: Loss | Sequence[Loss],
    directions: Sequence[Direction] | None = None,
    *,
    radius: float = 1.0,
    points: int = 21,
    seed: int = 0,
) -> LossSlice:
    """Return the loss at w + a d0 + b d1 for a and b from -radius to radius.

    Args:
        model: In the mode in which it shall be evaluated; see :mod:`wsam_fused.landscape`.
        loss: The mean loss, or one for each batch of equal size.
        directions: d0 and d1, as for :func:`loss_slice_1d`. By default two random ones,
            ``random_direction(model, seed)`` and ``random_direction(model, seed + 1)``, which are
            nearly orthogonal where there are many parameters.
        radius: The largest a and b, > 0, in units of the directions.
        points: How many of each, >= 2; an odd number has one at w. There are their square of
            evaluations.
        seed: Of the random directions, >= 0.

    Returns:
        Coordinates of shape [points], those of a and of b, and losses of shape [points, points],
        of which the first dimension is that of a.

    Raises:
        TypeError: As for :func:`loss_slice_1d`, or ``directions`` is no sequence.
        ValueError: As for :func:`loss_slice_1d`, or there are not two directions.
    """
    functions = loss_functions("loss", loss)
    params: list[Tensor] = list(trainable(model).values())
    coordinates = _coordinates(radius, points)
    if directions is None:
        directions = [random_direction(model, seed), random_direction(model, seed + 1)]
    given: Any = directions
    if not isinstance(given, Sequence):
        raise TypeError(f"directions is {type(given).__name__}, expected a sequence of two")
    if len(given) != 2:
        raise ValueError(f"directions has {len(given)} elements, expected two directions")
    plane = [as_direction(f"directions[{i}]", given[i], params) for i in range(2)]
    return LossSlice(coordinates, _losses(model, functions, params, plane, coordinates))


def _coordinates(radius: float, points: int) -> Tensor:
    radius = number("radius", radius, 0.0, low_included=False)
    points = whole_number("points", points, 2)
    # Whole numbers, so that the one in the middle is 0.
    steps = torch.arange(1 - points, points, 2, dtype=torch.float64, device="cpu")
    return radius * steps / (points - 1)


def _losses(
    model: nn.Module,
    functions: Sequence[Loss],
    params: list[Tensor],
    directions: Sequence[list[Tensor]],
    coordinates: Tensor,
) -> Tensor:
    """Return the losses over all combinations of coordinates, the first direction outermost."""
    places = torch.cartesian_prod(*[coordinates] * len(directions)).view(-1, len(directions))
    losses = []
    with as_found(model) as start, _movable(params) as origin:
        for place in places.tolist():
            with torch.no_grad():
                torch._foreach_copy_(params, origin)
                for coordinate, direction in zip(place, directions, strict=True):
                    torch._foreach_add_(params, direction, alpha=coordinate)
            losses.append(mean_loss(functions, start))
    shape = [len(coordinates)] * len(directions)
    return torch.tensor(losses, dtype=torch.float64, device="cpu").view(shape)


@contextmanager
def _movable(params: list[Tensor]) -> Iterator[list[Tensor]]:
    """Give a copy of the parameters, and write it back to them at the end."""
    origin = [param.detach().clone() for param in params]
    try:
        yield origin
    finally:
        with torch.no_grad():
            torch._foreach_copy_(params, origin)
        forget_casts()
