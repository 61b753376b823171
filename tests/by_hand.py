"""A training loop without a framework, which those with one have to equal."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Batch = tuple[Any, ...]

INPUTS, HIDDEN, OUTPUTS = 5, 9, 2
SAMPLES = 40


def network(batch_norm: bool = False) -> nn.Module:
    """A small float64 network, the same each time."""
    torch.manual_seed(3)
    norm: list[nn.Module] = [nn.BatchNorm1d(HIDDEN)] if batch_norm else []
    return nn.Sequential(
        nn.Linear(INPUTS, HIDDEN), *norm, nn.Tanh(), nn.Linear(HIDDEN, OUTPUTS)
    ).double()


def samples() -> tuple[Tensor, Tensor]:
    """Inputs and targets, the same each time."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(SAMPLES, INPUTS, generator=generator, dtype=torch.float64)
    y = torch.randn(SAMPLES, OUTPUTS, generator=generator, dtype=torch.float64)
    return x, y


def windows(size: int, parts: int) -> list[list[Batch]]:
    """All samples in batches of ``size``, of which each ``parts`` belong to one step."""
    x, y = samples()
    batches = list(zip(x.split(size), y.split(size), strict=True))
    return [batches[i : i + parts] for i in range(0, len(batches), parts)]


def train_by_hand(
    optimizer: Any,
    steps: Iterable[Sequence[Batch]],
    loss_of: Callable[..., Tensor],
    *,
    parts: int | None = None,
    clip: Callable[[], Any] | None = None,
    after_step: Callable[[], Any] | None = None,
) -> list[Tensor]:
    """Make a step with each window of micro-batches.

    Args:
        optimizer: Of this package.
        steps: The micro-batches of each step.
        loss_of: Their loss.
        parts: What the loss of a micro-batch is divided by; their number in the window if None.
        clip: Clips the gradients of each evaluation.
        after_step: Does what follows a step.

    Returns:
        The losses of the steps at the unperturbed weights.
    """
    losses = []
    for window in steps:

        def closure(window: Sequence[Batch] = window) -> Tensor:
            optimizer.zero_grad()
            total = torch.zeros((), dtype=torch.float64)
            for batch in window:
                loss = loss_of(*batch) / (parts or len(window))
                loss.backward()
                total = total + loss.detach()
            if clip is not None:
                clip()
            return total

        losses.append(optimizer.step(closure))
        if after_step is not None:
            after_step()
    return losses


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the parameters and buffers, by name."""
    return copy.deepcopy(model.state_dict())


def assert_same(actual: nn.Module, expected: nn.Module) -> None:
    """Assert that two models have the same bits."""
    pairs = zip(actual.state_dict().items(), expected.state_dict().values(), strict=True)
    for (name, found), wanted in pairs:
        assert torch.equal(found, wanted), f"{name}: {(found - wanted).abs().max()} apart"
