"""Methods that look at the losses of samples, and losses for them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from wsam_fused import ESAM, RWSAM

BATCH = 6
# A power of two: then w + delta z is rounded once in every precision.
METHODS: dict[str, Callable[..., Any]] = {
    "esam": functools.partial(ESAM, beta=0.6),
    "rwsam": functools.partial(RWSAM, delta=2.0**-10),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "euclidean": {"rho": 0.1},
    "adaptive": {"rho": 0.5, "geometry": "adaptive"},
    "fisher": {"rho": 0.1, "geometry": "fisher"},
    "backup": {"rho": 0.1, "restore": "backup"},
    "clip": {"rho": 0.1, "max_grad_norm": 0.5},
}


def vector(*values: float) -> torch.nn.Parameter:
    """A float64 parameter."""
    return torch.nn.Parameter(torch.tensor(values, dtype=torch.float64))


class Linear:
    """Losses that are linear in the parameters, so that gradients do not depend on the point."""

    def __init__(self, params: list[torch.nn.Parameter], seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.params = params
        self.slopes = [
            torch.randn(BATCH, *p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
            for p in params
        ]
        self.calls: list[Tensor | None] = []

    def __call__(self, index: Tensor | None = None) -> Tensor:
        self.calls.append(index)
        losses = self.params[0].new_zeros(BATCH)
        for param, slope in zip(self.params, self.slopes, strict=True):
            losses = losses + (slope * param).view(BATCH, param.numel()).sum(1)
        return losses if index is None else losses[index]


class Net:
    """A model with BatchNorm, dropout and a fixed batch."""

    def __init__(self, dropout: float = 0.0) -> None:
        self.model = torch.nn.Sequential(
            torch.nn.Linear(3, 8), torch.nn.BatchNorm1d(8), torch.nn.ReLU(), torch.nn.Linear(8, 4)
        ).double()
        self.dropout = dropout
        self.x = torch.randn(BATCH, 3, dtype=torch.float64)
        self.y = torch.arange(BATCH) % 4

    def __call__(self, index: Tensor | None = None) -> Tensor:
        x, y = (self.x, self.y) if index is None else (self.x[index], self.y[index])
        x = torch.nn.functional.dropout(x, self.dropout)
        return torch.nn.functional.cross_entropy(self.model(x), y, reduction="none")
