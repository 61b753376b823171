"""Compare single steps of the GPU backends with the reference, on a list of awkward tensors.

    python -m benchmarks.gpu_small_case [--backends cuda triton]

Small and without other kernels, so that it can run under compute-sanitizer: the reference steps
the same values on the CPU. ``PYTORCH_NO_CUDA_MEMORY_CACHING=1`` gives every tensor an allocation of
its own, outside of which nothing may be touched. Exits with 1 if anything differs.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW

from wsam_fused import SAM, WSAM
from wsam_fused.backends import BACKENDS

FOREIGN = "foreign"
# One of every update that the kernels have, with every term in it.
RULES: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": functools.partial(SGD, lr=0.05, weight_decay=0.01),
    "momentum": functools.partial(SGD, lr=0.05, momentum=0.9, dampening=0.3, weight_decay=0.01),
    "nesterov": functools.partial(SGD, lr=0.05, momentum=0.9, nesterov=True),
    "adam": functools.partial(Adam, lr=0.01, weight_decay=0.1),
    "adamw": functools.partial(AdamW, lr=0.01, weight_decay=0.1),
    "adamw-amsgrad": functools.partial(AdamW, lr=0.01, weight_decay=0.1, amsgrad=True),
    "adamw-maximize": functools.partial(AdamW, lr=0.01, maximize=True),
    FOREIGN: functools.partial(torch.optim.RMSprop, lr=0.01),
}
METHODS: dict[str, Callable[..., Any]] = {
    "wsam": functools.partial(WSAM, gamma=0.9),
    "coupled": functools.partial(WSAM, gamma=0.8, decouple=False),
    "sam": SAM,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"rho": 0.1},
    "adaptive": {"rho": 0.5, "adaptive": True},
    "backup": {"rho": 0.1, "restore": "backup"},
    "clip": {"rho": 0.1, "max_grad_norm": 0.5},
    "check-finite": {"rho": 0.1, "check_finite": True},
}
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Two correct computations: in float32 and float64 some roundings apart, where weights of 18 cancel;
# with fewer bits, rounded to neighbours that are at most so far apart.
TOLERANCES = {  # relative and absolute
    torch.float32: (1e-6, 4e-6),
    torch.float64: (1e-14, 1.5e-14),
    torch.bfloat16: (2.0**-7, 4e-6),
    torch.float16: (2.0**-10, 4e-6),
}
STEPS = 2


class Row(NamedTuple):
    """What is stepped how, all by name, and the dtype."""

    dtype: torch.dtype
    rule: str
    method: str
    option: str

    def make(self, params: Sequence[nn.Parameter], backend: str) -> Any:
        """Construct the optimizer."""
        return METHODS[self.method](
            params, RULES[self.rule], backend=backend, **OPTIONS[self.option]
        )


def rows(dtype: torch.dtype) -> Iterator[Row]:
    """Yield every rule with every option; a method is a row of numbers to a kernel, one rule does.

    A base optimizer without a fused update has its own arithmetic, which with few bits is torch's
    business.
    """
    for rule in RULES:
        for option in OPTIONS if rule != FOREIGN else ("plain",):
            if rule != FOREIGN or dtype.itemsize >= torch.float32.itemsize:
                yield Row(dtype, rule, "wsam", option)
    for method in ("coupled", "sam"):
        for option in OPTIONS:
            yield Row(dtype, "adamw", method, option)


def awkward(values: Callable[..., Tensor]) -> list[Tensor]:
    """Return tensors of which each is a difficulty.

    Args:
        values: Makes a tensor of a shape.
    """
    block = values(4000)
    sizes = [values(*shape) for shape in ((), (1,), (0,), (3, 0), (5,), (17, 3), (65,), (128, 129))]
    several_chunks = [values(140_001)]
    unaligned = [block[1:18], block[19:1042], block[1043:1044], block[1047:3999]]
    transposed = [values(8, 6).t(), values(4, 3, 5, 5).to(memory_format=torch.channels_last)]
    not_dense = [values(10, 20)[:, ::2]]
    return [*sizes, *several_chunks, *unaligned, *transposed, *not_dense]


def parameters(dtype: torch.dtype, device: torch.device) -> list[nn.Parameter]:
    """Return the awkward tensors with the same values on every device."""
    generator = torch.Generator().manual_seed(0)

    def values(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

    return [nn.Parameter(tensor) for tensor in awkward(values)]


def set_gradients(params: Sequence[nn.Parameter], seed: int) -> None:
    """Give every parameter the gradient of a seed, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    for param in params:
        values = torch.randn(param.shape, generator=generator, dtype=torch.float64)
        param.grad = values.to(param.device, param.dtype)


def compare(row: Row, backend: str, device: torch.device) -> int:
    """Make some steps and compare parameters and state after each.

    After a comparison the reference goes on from what the backend has, so that roundings do not add
    up.

    Returns:
        The number of steps.

    Raises:
        AssertionError: Something differs.
    """
    actual, expected = parameters(row.dtype, device), parameters(row.dtype, torch.device("cpu"))
    ours, reference = row.make(actual, backend), row.make(expected, "eager")
    for step in range(STEPS):
        for optimizer, params in ((ours, actual), (reference, expected)):
            set_gradients(params, 2 * step)
            optimizer.first_step(zero_grad=True)
            set_gradients(params, 2 * step + 1)
            optimizer.second_step(zero_grad=True)
        for index, (left, right) in enumerate(zip(actual, expected, strict=True)):
            _settle(f"parameter {index} of step {step + 1}", left, right)
            for key, value in reference.state[right].items():
                if isinstance(value, Tensor):
                    what = f"state {key!r} of parameter {index} of step {step + 1}"
                    _settle(what, ours.state[left][key], value)
    return STEPS


@torch.no_grad()
def _settle(what: str, actual: Tensor, expected: Tensor) -> None:
    found = actual.cpu()
    rtol, atol = TOLERANCES[expected.dtype]
    torch.testing.assert_close(
        found, expected, rtol=rtol, atol=atol, msg=lambda text: f"{what}: {text}"
    )
    expected.copy_(found)


def run(backend: str, device: torch.device) -> tuple[int, int]:
    """Compare all rows of the dtypes that a backend supports and print what differs.

    Returns:
        The number of steps compared, and of rows that differ.
    """
    steps = bad = 0
    supported = BACKENDS[backend].DTYPES or DTYPES
    for dtype in DTYPES:
        if dtype not in supported:
            print(f"{backend}: supports no {str(dtype).removeprefix('torch.')} parameters")
            continue
        for row in rows(dtype):
            try:
                steps += compare(row, backend, device)
            except (AssertionError, RuntimeError, ValueError) as error:
                bad += 1
                print(f"{backend}: {row} differs or fails: {error}", file=sys.stderr)
    return steps, bad


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backends", nargs="+", default=["cuda", "triton"], metavar="NAME")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    options = parser.parse_args(arguments)
    steps = bad = 0
    for backend in options.backends:
        if backend not in BACKENDS:
            parser.error(f"--backends has {backend!r}, expected some of {', '.join(BACKENDS)}")
        reason = BACKENDS[backend].unavailable()
        if reason is not None:
            raise SystemExit(f"error: backend {backend!r} is not available: {reason}")
        compared, differing = run(backend, torch.device(options.device))
        steps, bad = steps + compared, bad + differing
    print(f"compared {steps} steps, {bad} rows differ")
    if bad or not steps:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
