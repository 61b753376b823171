"""Steps with given gradients, of which only the optimizer's part is timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks.common import Shape
from benchmarks.methods.cases import Case

_BATCH = 8
_BACKWARD = torch.autograd.backward
# Evaluations of the longest step: a sum over micro-batches may live in the first gradients.
_LISTS = 4


class GivenGradients:
    """Parameters, and the gradients that stand in for those of a model.

    Args:
        shapes: Of the parameters.
    """

    def __init__(self, shapes: Sequence[Shape]) -> None:
        generator = torch.Generator().manual_seed(0)

        def random_list() -> list[Tensor]:
            return [torch.randn(shape, generator=generator).mul_(0.02) for shape in shapes]

        self.params = [nn.Parameter(tensor) for tensor in random_list()]
        self._values = [random_list() for _ in range(2)]
        self._grads = [[torch.empty_like(p) for p in self.params] for _ in range(_LISTS)]
        self._outside = 0
        self._evaluation = 0
        self._active = 0.0
        # Of each case: which share of the parameters had a first gradient, step by step.
        self.active: dict[str, list[float]] = {}

    def step(self, case: Case, optimizer: Any) -> float:
        """Make one step and return the milliseconds spent in the optimizer."""
        optimizer.zero_grad()
        self._outside = self._evaluation = 0
        what: Any = self._losses if case.per_sample else self._closure
        if case.microbatches:
            what = [self._closure] * case.microbatches
        start = time.perf_counter_ns()
        with mock.patch("torch.autograd.backward", self._backward):
            optimizer.step(what)
            spent = time.perf_counter_ns() - start - self._outside
        self.active.setdefault(case.name, []).append(self._active)
        return spent / 1e6

    @contextmanager
    def _not_counted(self) -> Iterator[None]:
        start = time.perf_counter_ns()
        yield
        self._outside += time.perf_counter_ns() - start

    def _closure(self) -> Tensor:
        with self._not_counted():
            self._set_gradients([True] * len(self.params))
            return torch.zeros(())

    def _losses(self, index: Tensor | None = None) -> Tensor:
        with self._not_counted():
            count = _BATCH if index is None else len(index)
            if not torch.is_grad_enabled():
                return torch.zeros(count)
            losses: Tensor = _Given.apply(self._set_gradients, count, *self.params)
            return losses

    def _backward(self, losses: Tensor) -> None:
        """The backward of methods that call it themselves: autograd's time is not theirs."""
        with self._not_counted():
            _BACKWARD(losses)

    @torch.no_grad()
    def _set_gradients(self, wanted: Sequence[bool]) -> None:
        number = self._evaluation
        self._evaluation += 1
        # Optimizers may write to gradients, and this touches all of them, as a model does.
        if number == 0:
            chosen = sum(p.numel() for p, wants in zip(self.params, wanted, strict=True) if wants)
            self._active = chosen / sum(param.numel() for param in self.params)
        grads = self._grads[number % _LISTS]
        torch._foreach_copy_(grads, self._values[number % 2])
        for param, grad, is_wanted in zip(self.params, grads, wanted, strict=True):
            if is_wanted:
                param.grad = grad


class _Given(torch.autograd.Function):
    """Losses whose backward leaves gradients in ``.grad`` by itself."""

    @staticmethod
    def forward(
        ctx: Any, backward: Callable[[Sequence[bool]], None], count: int, *params: Tensor
    ) -> Tensor:
        ctx.set_gradients = backward
        ctx.wanted = ctx.needs_input_grad[2:]
        return torch.zeros(count)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> Any:  # type: ignore[override]
        ctx.set_gradients(ctx.wanted)
        return (None,) * (2 + len(ctx.wanted))
