"""Whole training steps of nets whose forward and backward passes are nearly all of the time."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from wsam_fused import ESAM, RWSAM, SAM

_CLASSES = 10
_SIDE, _LENGTH = 16, 64
_SGDM = {"lr": 0.01, "momentum": 0.9}
FORWARD = "one forward, no gradient"

METHODS: dict[str, Callable[..., Any]] = {
    FORWARD: torch.optim.SGD,  # which makes no step
    "SGDM": torch.optim.SGD,
    "SAM": SAM,
    "ESAM": functools.partial(ESAM, beta=0.5, gamma=0.5),
    "RWSAM": RWSAM,
}


class Net(NamedTuple):
    """A net to be trained.

    Attributes:
        name: As in the tables.
        build: Makes it.
        input: Shape of its batch.
    """

    name: str
    build: Callable[[], nn.Module]
    input: tuple[int, ...]


class Training:
    """A net, random inputs, and an optimizer.

    Args:
        method: One of ``METHODS``.
        net: What is trained.
    """

    def __init__(self, method: str, net: Net) -> None:
        torch.manual_seed(0)
        self._net = net.build()
        self._x = torch.randn(net.input)
        self._y = torch.randint(_CLASSES, net.input[:1])
        self._optimizer = METHODS[method](self._net.parameters(), **_SGDM)
        self._step: Callable[[], Any] = functools.partial(self._optimizer.step, self._closure)
        if method in ("ESAM", "RWSAM"):
            self._step = functools.partial(self._optimizer.step, self._losses)
        elif method == FORWARD:
            self._step = self._forward

    def step(self) -> float:
        """Make one step and return its milliseconds."""
        start = time.perf_counter_ns()
        self._step()
        return (time.perf_counter_ns() - start) / 1e6

    def _closure(self) -> Tensor:
        self._optimizer.zero_grad()
        loss = cross_entropy(self._net(self._x), self._y)
        loss.backward()
        return loss

    def _losses(self, index: Tensor | None = None) -> Tensor:
        x, y = (self._x, self._y) if index is None else (self._x[index], self._y[index])
        return cross_entropy(self._net(x), y, reduction="none")

    @torch.no_grad()
    def _forward(self) -> None:
        self._losses()


def nets(quick: bool) -> tuple[Net, ...]:
    """Return the nets; small ones if it has to be quick."""
    width, images = (4, 8) if quick else (64, 128)
    features, sequences = (16, 4) if quick else (256, 32)
    return (
        Net(
            f"convolutional net of width {width}, {images} images of {_SIDE}x{_SIDE}",
            functools.partial(_convolutional, width),
            (images, 3, _SIDE, _SIDE),
        ),
        Net(
            f"transformer encoder of width {features}, {sequences} sequences of {_LENGTH}",
            functools.partial(_Encoder, features),
            (sequences, _LENGTH, features),
        ),
    )


def _convolutional(width: int) -> nn.Module:
    """Four convolutions with BatchNorm, and a linear layer."""
    channels = [3, width, width, 2 * width, 2 * width]
    layers: list[nn.Module] = []
    for into, out in itertools.pairwise(channels):
        layers += [nn.Conv2d(into, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
    layers.insert(6, nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(2 * width * (_SIDE // 2) ** 2, _CLASSES))


class _Encoder(nn.Module):
    """Two layers of a transformer's encoder, and a linear layer on the mean."""

    def __init__(self, width: int) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True)
        self._encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self._head = nn.Linear(width, _CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits of shape [sequences, classes]."""
        logits: Tensor = self._head(self._encoder(x).mean(1))
        return logits
