"""How far recomputing w, instead of keeping a copy, takes the weights in many steps.

The way to w + e and back rounds twice: p = round(w + e), then w' = round(p - e). Where p has no
wider spacing than w, w' = w. Where it has, w' is w but for an error of up to half a spacing of p.
Every step has another e, so that these errors add up like a random walk; with lr = 0 there is
nothing else, and what is measured is the walk.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from wsam_fused import SAM, WSAM

RHO = 0.05
# Magnitudes of the weights of the walk at lr = 0; e has about RHO / sqrt(all weights) = 1.4e-3.
MAGNITUDES = (1e-1, 1e-2, 1e-3, 1e-5, 0.0)
OF_EACH = 256
WEIGHTS = 1024  # of a training
LEARNING_RATE = 1e-3


class Walk(NamedTuple):
    """How far weights of one magnitude are from where they were, with lr = 0.

    Attributes:
        steps: Steps made.
        magnitude: Of the weights.
        moved: Share of them that are not what they were.
        typical: Root of the mean square of the distance, in spacings of float32 at the magnitude,
            or at the root mean square of e if that is larger.
        farthest: The largest distance, likewise.
        expected: What the random walk makes of ``typical``, likewise; for weights far below e.
    """

    steps: int
    magnitude: float
    moved: float
    typical: float
    farthest: float
    expected: float | None


class Distance(NamedTuple):
    """How far trainings are apart, in spacings of float32 at the root mean square weight.

    Attributes:
        steps: Steps made.
        typical: Root of the mean square between recomputed and copied w.
        farthest: The largest.
        of_float32: Root of the mean square between float32, with a copy of w, and float64.
    """

    steps: int
    typical: float
    farthest: float
    of_float32: float


def decades(steps: int) -> Iterator[int]:
    """Return 100, 1000, ... and the last step."""
    number = 100
    while number < steps:
        yield number
        number *= 10
    yield steps


def spacing(values: Tensor) -> Tensor:
    """Distance of the float32 of the size of ``values`` to the next larger one, float64."""
    size = values.abs().float()
    above = torch.nextafter(size, torch.full_like(size, math.inf))
    return above.double() - size.double()


def walk(steps: int, **options: Any) -> list[Walk]:
    """Step with lr = 0 and a new gradient every time, and see where the weights go.

    Args:
        steps: How many.
        options: Of the optimizer.
    """
    generator = torch.Generator().manual_seed(0)
    sizes = torch.tensor(MAGNITUDES).repeat_interleave(OF_EACH)
    first = (torch.rand(len(sizes), generator=generator) + 0.5) * sizes
    first *= torch.randint(0, 2, first.shape, generator=generator) * 2 - 1
    param = nn.Parameter(first.to(options.pop("dtype", torch.float32), copy=True))
    first = param.detach().clone()
    optimizer = SAM([param], torch.optim.SGD, lr=0.0, rho=RHO, backend="cpu", **options)
    gradient = torch.empty_like(param.detach())
    found: list[Walk] = []
    made = 0
    for until in decades(steps):
        for _ in range(until - made):
            param.grad = gradient.normal_(generator=generator).clone()
            optimizer.first_step(zero_grad=True)
            param.grad = gradient.clone()
            optimizer.second_step(zero_grad=True)
        made = until
        apart = (param.detach().double() - first.double()).abs().reshape(-1, OF_EACH)
        for magnitude, each in zip(MAGNITUDES, apart, strict=True):
            found.append(_walked(made, magnitude, each))
    return found


def _walked(steps: int, magnitude: float, apart: Tensor) -> Walk:
    e = RHO / math.sqrt(len(MAGNITUDES) * OF_EACH)
    unit = spacing(torch.tensor(max(magnitude, e))).item()
    small = magnitude < 0.1 * e
    return Walk(
        steps,
        magnitude,
        (apart > 0).double().mean().item(),
        apart.square().mean().sqrt().item() / unit,
        apart.max().item() / unit,
        math.sqrt(steps) * _loss_per_step(e) / unit if small else None,
    )


def _loss_per_step(e: float) -> float:
    """Root mean square of what one step loses of a weight that is small against e.

    An error that is uniform in half a spacing of p on either side, p normal with deviation ``e``.
    """
    p = torch.randn(1_000_000, generator=torch.Generator().manual_seed(1)) * e
    return (spacing(p).square() / 12).mean().sqrt().item()


Gradient = Callable[[Tensor, Tensor], Tensor]

# What the gradient at p is, with noise that is the same for all. That of a bowl pulls what has
# drifted apart together again; where it does not depend on p, nothing does.
PROBLEMS: Mapping[str, Gradient] = {
    "noise alone": lambda p, noise: noise.to(p.dtype, copy=True),
    "a bowl with noise": lambda p, noise: p + noise.to(p.dtype),
}


class _Trained:
    def __init__(self, first: Tensor, dtype: torch.dtype, options: Mapping[str, Any]) -> None:
        self.param = nn.Parameter(first.to(dtype, copy=True))
        # Without decay: 1 - lr * weight_decay in float32 is another decay than in float64.
        adamw = functools.partial(torch.optim.AdamW, lr=LEARNING_RATE, weight_decay=0.0)
        self.optimizer = WSAM([self.param], adamw, rho=RHO, backend="cpu", **options)

    def step(self, gradient: Gradient, noise: Tensor) -> None:
        for call in (self.optimizer.first_step, self.optimizer.second_step):
            self.param.grad = gradient(self.param.detach(), noise)
            call(zero_grad=True)


def trainings(problem: str, steps: int, **options: Any) -> list[Distance]:
    """Train with recomputed w, with a copy, and with a copy in float64, along the same noise.

    Args:
        problem: A key of ``PROBLEMS``.
        steps: How many.
        options: Of the optimizers, and ``dtype`` of the first two.
    """
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(WEIGHTS, generator=generator) * 0.1
    dtype = options.pop("dtype", torch.float32)
    copies = {**options, "restore": "backup"}
    recomputed, copied = (_Trained(first, dtype, each) for each in (options, copies))
    wide = _Trained(first, torch.float64, {"restore": "backup"})
    noise = torch.empty(WEIGHTS)
    found: list[Distance] = []
    made = 0
    for until in decades(steps):
        for _ in range(until - made):
            noise.normal_(generator=generator)
            for trained in (recomputed, copied, wide):
                trained.step(PROBLEMS[problem], noise)
        made = until
        found.append(_distance(made, *(each.param.detach() for each in (recomputed, copied, wide))))
    return found


def _distance(steps: int, recomputed: Tensor, copied: Tensor, wide: Tensor) -> Distance:
    unit = spacing(copied.double().square().mean().sqrt()).item()
    apart = (recomputed.double() - copied.double()).abs()
    return Distance(
        steps,
        apart.square().mean().sqrt().item() / unit,
        apart.max().item() / unit,
        (copied.double() - wide).square().mean().sqrt().item() / unit,
    )
