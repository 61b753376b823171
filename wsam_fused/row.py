"""A method of the SAM family as a row of coefficients."""

from __future__ import annotations

from dataclasses import dataclass

Coefficients = tuple[float, float, float]


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
        h: Weights of the gradients in h.
        d: Weights of the gradients in d.
    """

    evaluations: int
    h: Coefficients
    d: Coefficients = (0.0, 0.0, 0.0)
