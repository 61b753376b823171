"""One training step of any method: how it is given its gradients, and the time that it takes."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.variable import Variable
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

Takes = Literal["closure", "closures", "losses"]


def train_step(
    takes: Takes, net: nn.Module, optimizer: Optimizer, x: Tensor, y: Tensor, *, parts: int = 1
) -> tuple[float, float]:
    """Make one step on the mean cross entropy of a mini-batch.

    Args:
        takes: What ``optimizer.step`` is given: a closure, a closure for each micro-batch, or a
            function that returns the loss of every sample.
        net: The network.
        optimizer: Of its parameters.
        x: Inputs, shape [n, ...].
        y: Classes, shape [n].
        parts: Micro-batches that the mini-batch is cut into, if it takes ``"closures"``.

    Returns:
        Seconds of all of it, and of the part inside the optimizer.
    """
    clock = _ModelClock()

    def closure(x: Tensor, y: Tensor) -> Tensor:
        with clock.running():
            if takes == "closure":
                optimizer.zero_grad()
            loss = cross_entropy(net(x), y)
            loss.backward()
            return loss.detach()

    def losses_fn(index: Tensor | None = None) -> Tensor:
        with clock.running():
            chosen = (x, y) if index is None else (x[index], y[index])
            losses = cross_entropy(net(chosen[0]), chosen[1], reduction="none")
            return clock.with_backward(losses)

    what: Any = functools.partial(closure, x, y)
    if takes == "closures":
        pairs = zip(x.chunk(parts), y.chunk(parts), strict=True)
        what = [functools.partial(closure, *pair) for pair in pairs]
    elif takes == "losses":
        what = losses_fn
    begin = time.perf_counter()
    optimizer.step(what)
    whole = time.perf_counter() - begin
    optimizer.zero_grad()
    return whole, whole - clock.spent


class _ModelClock:
    """Seconds spent in the model, forward and backward.

    Attributes:
        spent: So far.
    """

    def __init__(self) -> None:
        self.spent = 0.0
        self._begin = 0.0

    def start(self) -> None:
        """Start."""
        self._begin = time.perf_counter()

    def stop(self) -> None:
        """Stop."""
        self.spent += time.perf_counter() - self._begin

    @contextmanager
    def running(self) -> Iterator[None]:
        """Run meanwhile."""
        self.start()
        yield
        self.stop()

    def with_backward(self, losses: Tensor) -> Tensor:
        """Return the losses, in whose backward pass the clock runs."""
        if not losses.requires_grad:
            return losses
        timed: Tensor = _Timed.apply(losses, self)
        return timed


class _Timed(torch.autograd.Function):
    """The identity, the first thing that a backward pass meets."""

    @staticmethod
    def forward(ctx: Any, losses: Tensor, clock: _ModelClock) -> Tensor:
        ctx.clock = clock
        return losses.view_as(losses)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        ctx.clock.start()
        Variable._execution_engine.queue_callback(ctx.clock.stop)  # at the end of this backward
        return grad, None
