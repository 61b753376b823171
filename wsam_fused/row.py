"""A method of the SAM family as a row of coefficients."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

Coefficients = tuple[float, float, float]

# Stands in a row for a coefficient that only the device knows; one object, so that rows compare
# equal.
DERIVED = math.nan


class Sums(NamedTuple):
    """What the reductions of a step say of its gradients, as float64 scalars on the device.

    Attributes:
        norm1: Norm of g1, clipped as it enters the update.
        norm2: Norm of g2, likewise.
        norm3: Norm of g3, likewise.
        dot12: g1 . g2, of the clipped gradients.
        eps: Added to norms that something is divided by.
    """

    norm1: Tensor
    norm2: Tensor
    norm3: Tensor
    dot12: Tensor
    eps: float


@dataclass(frozen=True)
class Row:
    """What a method feeds to its base optimizer, as weights of the gradients of one step.

    Math:
        h  = h[0] g1 + h[1] g2 + h[2] g3      the base optimizer's gradient
        d  = d[0] g1 + d[1] g2 + d[2] g3      the decoupled sharpness term
        w' = base(w, h) - lr d

    with g1 the gradient at w, g2 at the ascent point, g3 at the descent point.

    Attributes:
        evaluations: How often a step evaluates the gradient, 1 to 3.
        h: Weights of the gradients in h; ``DERIVED`` where ``derive`` gives one.
        d: Weights of the gradients in d; likewise.
        derive: Gives derived weights by column (``"h1"`` to ``"d3"``) from the sums of the step,
            without waiting for the device. A row that has it needs the norms of all gradients.
        needs_dot: Whether it also needs g1 . g2.
    """

    evaluations: int
    h: Coefficients
    d: Coefficients = (0.0, 0.0, 0.0)
    derive: Callable[[Sums], Mapping[str, Tensor]] | None = None
    needs_dot: bool = False


# A step of the base optimizer alone.
BASE_ROW = Row(evaluations=1, h=(1.0, 0.0, 0.0))
