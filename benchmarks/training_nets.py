"""Nets whose training steps are measured for their memory."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint


class Transformer(nn.Module):
    """An encoder between an embedding and an output layer.

    Args:
        width: Of the model; a head has 64 of it, an inner layer four times as much.
        layers: How many.
        vocabulary: Classes of inputs and outputs.
        checkpointed: Compute the activations of a layer again in its backward.
    """

    def __init__(self, width: int, layers: int, vocabulary: int, checkpointed: bool) -> None:
        super().__init__()
        self._checkpointed = checkpointed
        self.embedding = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, width // 64, 4 * width, dropout=0.0, batch_first=True, norm_first=True
            )
            for _ in range(layers)
        )
        self.output = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the mean loss of predicting every token itself."""
        x = self.embedding(tokens)
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self._checkpointed else layer(x)
        return cross_entropy(self.output(x).flatten(0, 1), tokens.flatten())


class Perceptron(nn.Module):
    """Layers of one width, with a class for every unit of the last one.

    Args:
        width: Of all layers.
        layers: How many.
    """

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        """Return the mean loss, with class 0 for all."""
        for layer in self.layers:
            x = torch.relu(layer(x))
        return cross_entropy(x, torch.zeros(len(x), dtype=torch.int64, device=x.device))


class Net(NamedTuple):
    """A net and what it is given.

    Attributes:
        name: As in the tables.
        build: Makes it; it returns its loss.
        input: Makes a batch.
    """

    name: str
    build: Callable[[], nn.Module]
    input: Callable[[], Tensor]


def transformer(
    batch: int,
    length: int,
    *,
    width: int = 512,
    layers: int = 6,
    vocabulary: int = 1000,
    checkpointed: bool = False,
) -> Net:
    """Return an encoder that is given ``batch`` sequences."""
    name = f"transformer, {batch} x {length}" + (", checkpointed" if checkpointed else "")
    build = functools.partial(Transformer, width, layers, vocabulary, checkpointed)
    return Net(name, build, functools.partial(torch.randint, vocabulary, (batch, length)))


def perceptron(batch: int, *, width: int = 1024, layers: int = 8) -> Net:
    """Return a perceptron that is given ``batch`` inputs."""
    build = functools.partial(Perceptron, width, layers)
    return Net(f"perceptron, {batch}", build, functools.partial(torch.randn, batch, width))


NETS = (
    perceptron(4),
    transformer(1, 16),
    transformer(4, 128),
    transformer(4, 128, checkpointed=True),
)
