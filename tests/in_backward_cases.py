"""Nets and steps that the tests of the update in the backward share."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
from cases import device_of
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.optim import SGD, Adam, AdamW

from wsam_fused import ESAM, GNP, RWSAM, SAM, WSAM

METHODS: dict[str, Callable[..., Any]] = {
    "sam": SAM,
    "wsam": functools.partial(WSAM, gamma=0.9),
    "coupled": functools.partial(WSAM, gamma=0.8, decouple=False),
    "gnp": functools.partial(GNP, alpha=0.8),
}
PER_SAMPLE: dict[str, Callable[..., Any]] = {
    "esam": functools.partial(ESAM, beta=0.6, seed=3),
    "rwsam": RWSAM,
}
BASES: dict[str, Callable[..., Any]] = {
    "sgd": functools.partial(SGD, lr=0.05, weight_decay=0.01),
    "sgdm": functools.partial(SGD, lr=0.05, momentum=0.9, dampening=0.3),
    "adamw": functools.partial(AdamW, lr=0.01, weight_decay=0.1),
    "amsgrad": functools.partial(Adam, lr=0.01, amsgrad=True),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"rho": 0.1},
    "adaptive": {"rho": 0.5, "adaptive": True},
    "fisher": {"rho": 0.1, "geometry": "fisher"},
    "backup": {"rho": 0.1, "restore": "backup"},
}


class Net(nn.Module):
    """An embedding whose weights are tied to the output, large and small parameters."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(13, 8)
        self.inner = nn.Linear(8, 24)
        self.norm = nn.LayerNorm(24)
        self.outer = nn.Linear(24, 8)
        self.unused = nn.Parameter(torch.ones(3))
        self.to(dtype)
        self.x = torch.randint(13, (6,))
        self.y = torch.randn(6, 13, dtype=dtype)

    def losses(self, index: Tensor | None = None) -> Tensor:
        x, y = (self.x, self.y) if index is None else (self.x[index], self.y[index])
        hidden = self.embedding(x)
        hidden = hidden + self.outer(torch.tanh(self.norm(self.inner(hidden))))
        return (hidden @ self.embedding.weight.t() - y).square().mean(1)


def closure_of(net: Any, optimizer: Any) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = net.losses().mean()
        loss.backward()
        return loss

    return closure


class Separate(nn.Module):
    """Parameters without anything in common, of integers, so that sums of squares are exact.

    They are the same then in whatever order they are added, and nothing else of a step depends on
    how its parameters are divided into lists.
    """

    def __init__(self, backend: str, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        shapes = [(), (5,), (30, 7), (3,), (400,), (2, 2), (65,)]
        device = device_of(backend)
        values = [torch.randint(-3, 4, shape).to(device, dtype) for shape in shapes]
        self.weights = nn.ParameterList(nn.Parameter(value) for value in values)

    def losses(self, index: Tensor | None = None) -> Tensor:
        terms = [k * 0.5 * w.square().sum() for k, w in enumerate(self.weights, 1)]
        return torch.stack(terms).sum().reshape(1)


def chain(sizes: tuple[int, ...] = (6, 16, 16, 3)) -> tuple[nn.Sequential, Tensor, Tensor]:
    """A perceptron without biases: each weight has a list of its own."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for into, out in itertools.pairwise(sizes):
        layers += [nn.Linear(into, out, bias=False), nn.Tanh()]
    return nn.Sequential(*layers), torch.randn(5, sizes[0]), torch.randn(5, sizes[-1])


def chain_loss(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return mse_loss(net(x), y)


def values_of(params: Any) -> list[Tensor]:
    return [param.detach().clone() for param in params]
