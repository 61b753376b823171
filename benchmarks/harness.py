"""Runs contenders on one problem: side by side in time, and one step for comparison."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import Shape, count_of
from benchmarks.contenders.contender import BASES, Base, Contender
from benchmarks.load import quiet_rounds

# Small enough to compile at once; sizes that are no multiple of a vector's.
PARITY_SHAPES: list[Shape] = [(33, 17), (5,), (64, 3, 3)]
STREAM_MIN_BYTES = 64 * 2**20


class ParityError(RuntimeError):
    """A contender computes something else than ours: its time means nothing."""


class Problem:
    """Parameters and the gradients of both evaluations, which all contenders share.

    The gradients do not depend on the parameters: their values cost the same, and a backward pass
    would only add to what is not timed.

    Args:
        shapes: Of the parameters.
        seed: Of the random values.
        device: Where all of it is.
        dtype: Of the parameters and the gradients.
    """

    def __init__(
        self,
        shapes: Sequence[Shape],
        seed: int = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        generator = torch.Generator(device).manual_seed(seed)

        def random_list() -> list[Tensor]:
            how: Any = {"generator": generator, "device": device, "dtype": dtype}
            return [torch.randn(shape, **how).mul_(0.02) for shape in shapes]

        self.params = [nn.Parameter(tensor) for tensor in random_list()]
        self.g1 = random_list()
        self._g2_values = random_list()
        self.g2 = [tensor.clone() for tensor in self._g2_values]

    def set_first(self) -> None:
        """Give the parameters the gradients at w."""
        for param, grad in zip(self.params, self.g1, strict=True):
            param.grad = grad

    def set_second(self) -> None:
        """Give the parameters the gradients at the ascent point, which contenders may spoil."""
        torch._foreach_copy_(self.g2, self._g2_values)
        for param, grad in zip(self.params, self.g2, strict=True):
            param.grad = grad

    def step(self, contender: Contender) -> float:
        """Make one step and return its milliseconds; setting gradients is not timed."""
        self.set_first()
        start = time.perf_counter_ns()
        contender.first()
        spent = time.perf_counter_ns() - start
        if contender.gradients > 1:
            self.set_second()
            start = time.perf_counter_ns()
            contender.second()
            spent += time.perf_counter_ns() - start
        return spent / 1e6


@dataclass
class Round:
    """What one round measured.

    Attributes:
        steps: Milliseconds of each contender.
        stream: Milliseconds of the in-place loop.
        others: Share of the cores that other processes used meanwhile.
    """

    steps: dict[str, float]
    stream: float
    others: float


@dataclass
class Timings:
    """The rounds that count.

    Attributes:
        rounds: In no particular order.
        stream_elements: What the in-place loop runs over.
    """

    rounds: list[Round]
    stream_elements: int

    def steps(self, contender: str) -> list[float]:
        """Milliseconds of one contender per round."""
        return [one.steps[contender] for one in self.rounds]

    def stream_rate(self) -> list[float]:
        """GB/s of the in-place loop per round: it reads and writes every float32."""
        return [2 * 4 * self.stream_elements / one.stream / 1e6 for one in self.rounds]

    def others(self) -> float:
        """Mean share of the cores that other processes used."""
        return statistics.mean(one.others for one in self.rounds)


def interleave(
    problem: Problem,
    contenders: Sequence[Contender],
    rounds: int,
    warmup: int,
    advance: Callable[[], object] = lambda: None,
) -> Timings:
    """Time all contenders in every round, each time in another order.

    All step the same parameters and share the state of their ``torch.optim`` optimizers: values do
    not matter here, and memory does. The quietest rounds count.

    Args:
        problem: What they step.
        contenders: Who takes part.
        rounds: How many count.
        warmup: How many are made before and do not count.
        advance: Called after each quiet round.
    """
    optimizers = [c.optimizer for c in contenders if c.optimizer is not None]
    for optimizer in optimizers:
        optimizer.state = optimizers[0].state
    elements = max(count_of([p.shape for p in problem.params]), STREAM_MIN_BYTES // 4)
    buffer = torch.ones(elements)
    shuffler = random.Random(0)

    def measured() -> tuple[dict[str, float], float]:
        order = shuffler.sample(contenders, len(contenders))
        steps = {contender.name: problem.step(contender) for contender in order}
        start = time.perf_counter_ns()
        buffer.mul_(1.0)
        return steps, (time.perf_counter_ns() - start) / 1e6

    found = quiet_rounds(measured, rounds, warmup, advance)
    return Timings([Round(*one, others) for others, one in found], elements)


def check_parity(
    contender: type[Contender],
    reference: type[Contender],
    base: Base,
    device: torch.device | str = "cpu",
) -> None:
    """Compare two steps on small float32 tensors, at the ascent point and after the update.

    Raises:
        ParityError: The displacements differ by more than float32 rounding.
    """
    if contender.gradients != reference.gradients:
        return
    seen = []
    for cls in (contender, reference):
        problem = Problem(PARITY_SHAPES, device=device)
        start = [param.detach().clone() for param in problem.params]
        one = cls(problem.params, base)
        points = []
        for _ in range(2):
            problem.set_first()
            one.first()
            points.append([p.detach() - w for p, w in zip(problem.params, start, strict=True)])
            problem.set_second()
            one.second()
            points.append([p.detach() - w for p, w in zip(problem.params, start, strict=True)])
        seen.append(points)
    for k, (actual, expected) in enumerate(zip(*seen, strict=True)):
        try:
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-7)
        except AssertionError as error:
            where = "at the ascent point" if k % 2 == 0 else "after the update"
            raise ParityError(
                f"{contender.name} with {base.name} differs from {reference.name} {where} of step "
                f"{k // 2 + 1}, so that their times cannot be compared: {error}"
            ) from error


def check_all(contenders: Iterable[type[Contender]], reference: type[Contender]) -> None:
    """Check every contender with every base; see :func:`check_parity`."""
    for contender in contenders:
        for base in BASES.values():
            check_parity(contender, reference, base)


def median_rate(moved: int, parameters: int, milliseconds: Sequence[float]) -> float:
    """GB/s of a step that moves ``moved`` float32 elements per parameter."""
    return moved * parameters * 4 / statistics.median(milliseconds) / 1e6
