"""The check of the demonstration: fused and eager runs end in the same weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks import demo_methods
from benchmarks import demo_model as model
from benchmarks.demo_report import table
from wsam_fused import backends

CHECKED = ("SAM", "WSAM", "Coupled-WSAM")
_BASES = ("SGDM", "AdamW")
# float64 rounds by 1e-16, and in so few steps the training amplifies that by 1e4 at the most.
_FLOAT64_BOUND = 1e-9
_CAPTION = """\
float64, float32    max |fused - eager| / max |eager| of each tensor, the largest of all tensors;
                    in float64 at most {float64_bound:g}
float32 bound       {steps} x how far an eager run ends off if it starts off by one rounding per
                    weight: training amplifies rounding, and each of the {steps} steps adds its own
eager / fused time  medians of the float32 runs, time inside the optimizer only
"""


@dataclass(frozen=True)
class Agreement:
    """How far the fused and the eager run of one method ended apart, and how far they may."""

    method: str
    base: str
    float64: float
    float32: float
    float32_bound: float
    speedup: float

    @property
    def passed(self) -> bool:
        """Whether both differences are within their bounds; a NaN is not."""
        return self.float64 <= _FLOAT64_BOUND and self.float32 <= self.float32_bound


def difference(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    """Return max |l - r| / max |r| of each pair of tensors, the largest of all; NaN counts."""
    pairs = zip(left, right, strict=True)
    ratios = [(a - b).abs().max().double() / b.abs().max().double() for a, b in pairs]
    return torch.stack(ratios).max().item()


def nudge(params: Iterable[Tensor]) -> None:
    """Move every weight by one rounding, up or down at random."""
    with torch.no_grad():
        for param in params:
            signs = torch.randint_like(param, 2).mul_(2).sub_(1)
            param.addcmul_(param, signs, value=torch.finfo(param.dtype).eps)


def end_weights(
    method: str,
    base: str,
    data: model.Digits,
    backend: str,
    *,
    seed: int,
    steps: int,
    nudged: bool = False,
) -> tuple[list[Tensor], model.Timer]:
    """Train for some steps and return the weights and the times.

    Args:
        method: As for :func:`benchmarks.demo_methods.build_optimizer`.
        base: Likewise.
        data: The digits, in the dtype to train in.
        backend: ``"auto"`` or ``"eager"``.
        seed: Decides the starting weights and the order of the images.
        steps: Number of steps.
        nudged: Start from weights that are off by one rounding, up or down at random.
    """
    net = model.build_net(seed, data.train_x.dtype).train()
    params = list(net.parameters())
    if nudged:
        nudge(params)
    optimizer = demo_methods.build_optimizer(method, base, net, backend)
    timer = model.Timer()
    stream = model.batches(data, seed)
    for _ in range(steps):
        timer.add(*demo_methods.train_step(method, net, optimizer, *next(stream)))
    return [param.detach() for param in params], timer


def check_pair(
    method: str, base: str, data: dict[torch.dtype, model.Digits], seed: int, steps: int
) -> Agreement:
    """Run one method on both backends in both dtypes."""

    def run(
        dtype: torch.dtype, backend: str, nudged: bool = False
    ) -> tuple[list[Tensor], model.Timer]:
        return end_weights(
            method, base, data[dtype], backend, seed=seed, steps=steps, nudged=nudged
        )

    exact = difference(run(torch.float64, "auto")[0], run(torch.float64, "eager")[0])
    fused, fused_timer = run(torch.float32, "auto")
    eager, eager_timer = run(torch.float32, "eager")
    # What one rounding at the start grows to; each step may add one.
    grown = difference(run(torch.float32, "eager", nudged=True)[0], eager)
    return Agreement(
        method,
        base,
        exact,
        difference(fused, eager),
        steps * max(grown, torch.finfo(torch.float32).eps),
        eager_timer.median_optimizer() / fused_timer.median_optimizer(),
    )


def check(methods: Sequence[str], seed: int, steps: int) -> list[str]:
    """Compare fused and eager runs and print the outcome.

    Args:
        methods: Of :data:`benchmarks.demo_methods.METHODS`; each is compared over both bases.
        seed: Decides the starting weights and the order of the images.
        steps: Number of steps that each run makes.

    Returns:
        What is wrong, one line each; empty if all is well or there is nothing to compare.
    """
    data = {dtype: model.load(dtype) for dtype in (torch.float32, torch.float64)}
    choices = [backends.select("auto", torch.device("cpu"), dtype) for dtype in data]
    missing = [choice.reason for choice in choices if choice.name == "eager"]
    if missing:
        print(f"Fused against eager NOT CHECKED, no fused backend is usable here: {missing[0]}")
        return []
    pairs = tqdm(list(product(methods, _BASES)), desc="fused against eager", unit="pair")
    found = [check_pair(method, base, data, seed, steps) for method, base in pairs]
    # Equal weights prove something only if other weights would have been noticed.
    sam, wsam = (
        end_weights(method, "SGDM", data[torch.float64], "auto", seed=seed, steps=steps)[0]
        for method in ("SAM", "WSAM")
    )
    apart = difference(wsam, sam)
    _print_outcome(found, apart, seed, steps)
    wrong = [
        f"{pair.method} with {pair.base} ends elsewhere on the fused backend: off by "
        f"{pair.float64:.1e} in float64 (allowed {_FLOAT64_BOUND:g}) and {pair.float32:.1e} in "
        f"float32 (allowed {pair.float32_bound:.1e})"
        for pair in found
        if not pair.passed
    ]
    widest = max(pair.float32_bound for pair in found if pair.base == "SGDM")
    if not apart > widest:
        wrong.append(
            f"the check cannot tell SAM from WSAM: they end {apart:.1e} apart, and a difference of "
            f"{widest:.1e} is allowed"
        )
    return wrong


def _print_outcome(found: Sequence[Agreement], apart: float, seed: int, steps: int) -> None:
    headers = ("method", "base", "float64", "float32", "float32 bound", "eager / fused time", "")
    rows = [
        (
            pair.method,
            pair.base,
            f"{pair.float64:.1e}",
            f"{pair.float32:.1e}",
            f"{pair.float32_bound:.1e}",
            f"{pair.speedup:.1f}",
            "same" if pair.passed else "DIFFERENT",
        )
        for pair in found
    ]
    ratios = [pair.speedup for pair in found]
    print(f"Do fused and eager runs end in the same weights? {steps} steps, seed {seed}:\n")
    print(f"{table(headers, rows)}\n")
    print(_CAPTION.format(float64_bound=_FLOAT64_BOUND, steps=steps))
    print(f"For scale: SAM and WSAM with SGDM end {apart:.1e} apart.")
    print(
        f"The fused optimizer step was {min(ratios):.1f} to {max(ratios):.1f} times faster than "
        "the eager one here. The eager\nbackend is the reference that defines the result, not a "
        "competitor; `make bench` measures those."
    )
