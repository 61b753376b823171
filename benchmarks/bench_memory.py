"""Peak memory of a step, measured exactly: every allocation of torch is recorded.

    python -m benchmarks.bench_memory [--shapes ...] [--bases ...] [--contenders ...]

The unit is a copy of all parameters. What counts is everything that a training loop would see
above the parameters: states, scratch that stays from step to step, both gradient lists while they
are alive, and temporaries. A plain fused base step has its states and one gradient list; its peak
is subtracted.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.common import FULL, Shape, count_of, shapes_of
from benchmarks.contenders import BASES, CONTENDERS, Base, Contender, Plain
from benchmarks.recorded_memory import peak_of


@dataclass(frozen=True)
class Memory:
    """What a contender needs beyond a plain fused step, in copies of the parameters.

    Attributes:
        peak: At the worst moment of a step.
        state: In ``state_dict()``, counting tensors only that have dimensions.
    """

    peak: float
    state: float


def measure(contender: type[Contender], base: Base, shapes: Sequence[Shape]) -> Memory:
    """Run two steps of a contender and of the floor, and compare."""
    copy = 4 * count_of(shapes)
    peak, state = _run(contender, base, shapes)
    plain_peak, plain_state = _run(Plain, base, shapes)
    return Memory((peak - plain_peak) / copy, (state - plain_state) / copy)


def _run(contender: type[Contender], base: Base, shapes: Sequence[Shape]) -> tuple[int, int]:
    params = [nn.Parameter(torch.full(shape, 0.02)) for shape in shapes]
    made = []

    def steps() -> None:
        made.append(contender(params, base))
        for _ in range(2):
            training_step(made[0], params)

    peak = peak_of(steps)
    kept = [t for t in _tensors(made[0].state_dict()) if t.dim() > 0]
    return peak, sum(t.numel() * t.element_size() for t in kept)


def training_step(contender: Contender, params: Sequence[nn.Parameter]) -> None:
    """Step as a training loop does: nobody but the contender holds on to a gradient."""
    for param in params:
        param.grad = None
    for half in (contender.first, contender.second)[: contender.gradients]:
        for param in params:
            param.grad = torch.full_like(param, 0.01)
        half()


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


@pytest.mark.parametrize("base", BASES)
def bench_memory_is_one_gradient_list(base: str) -> None:
    """The promise of the design, where tensors are large against their bookkeeping."""
    memory = measure(CONTENDERS["wsam_fused"], BASES[base], shapes_of("4x128x128"))
    assert memory.peak == pytest.approx(1.0, abs=0.05)
    assert memory.state == 0.0


@pytest.mark.parametrize("base", BASES)
def bench_memory_counts_scratch(base: str) -> None:
    """The measurement sees what is known to be there: e, g1 and the sharpness stay."""
    memory = measure(CONTENDERS["authors-fused"], BASES[base], shapes_of("4x128x128"))
    assert memory.peak >= 3.0
    assert math.isclose(memory.state, 3.0)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table; ``benchmarks.bench_step`` puts the same numbers into the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=[FULL[1], FULL[3]])
    parser.add_argument("--bases", nargs="+", default=list(BASES), choices=list(BASES))
    names = list(CONTENDERS)
    default = [name for name in names if name != "foreach-compiled"]  # takes minutes to compile
    parser.add_argument("--contenders", nargs="+", default=default, choices=names)
    options = parser.parse_args(arguments)
    print(f"{'shapes':<14}{'base':<8}{'contender':<28}{'peak':>8}{'state_dict':>12}")
    for shapes, base, name in _cases(options):
        reason = CONTENDERS[name].unavailable()
        if reason is not None:
            print(f"{shapes:<14}{base:<8}{name:<28}{reason}")
            continue
        memory = measure(CONTENDERS[name], BASES[base], shapes_of(shapes))
        print(f"{shapes:<14}{base:<8}{name:<28}{memory.peak:>8.3f}{memory.state:>12.3f}")
        sys.stdout.flush()
    print("copies of the parameters beyond a plain fused step")


def _cases(options: argparse.Namespace) -> Iterable[tuple[str, str, str]]:
    for shapes in options.shapes:
        for base in options.bases:
            for name in options.contenders:
                yield shapes, base, name


if __name__ == "__main__":
    main()
