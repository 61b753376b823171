"""Compares single steps of the GPU backends with the reference, over few but awkward tensors.

    PYTHONPATH=. python tests/gpu_small_case.py [--backends cuda triton]

A script of its own, so that it can run under compute-sanitizer: without pytest, and with the
reference on the CPU, whose kernels would be most of what is sanitized. With
``PYTORCH_NO_CUDA_MEMORY_CACHING=1`` every tensor is an allocation of its own, outside of which
nothing may be touched. Exits with 1 if anything differs.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from cases import BASES, FOREIGN_BASES, KEEPING, LAYOUTS, METHODS, OPTIONS, keepings_of, moved
from comparison import step_both

from wsam_fused.backends import BACKENDS

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
# Of parameters and gradients.
PAIRS = ((F32, F32), (F32, BF16), (F32, F16), (F64, F64), (BF16, BF16), (F16, F16))
# One of every update that the kernels have, with every term in it.
RULES = ("sgd-l2", "sgdm-dampened", "nesterov", "adam", "adamw", "adamw-amsgrad", "adamw-maximize")
FOREIGN = "rmsprop"
STEPS = 2


class Row(NamedTuple):
    """What is stepped how, all by name, and the dtypes."""

    dtype: torch.dtype
    grad_dtype: torch.dtype
    base: str
    method: str
    option: str
    layout: str = "awkward"
    keeping: str = ""


def rows(dtype: torch.dtype, grad_dtype: torch.dtype) -> Iterator[Row]:
    """Yield every rule with every option; a method is a row of numbers to a kernel, one rule does.

    A base optimizer without a fused update has its own arithmetic, which with few bits is torch's
    business.
    """
    if grad_dtype != dtype:
        for option in OPTIONS:
            yield Row(dtype, grad_dtype, "adamw", "wsam", option)
        return
    for base in RULES:
        for option in OPTIONS:
            yield Row(dtype, grad_dtype, base, "wsam", option)
    for method in ("coupled", "sam", "gsam", "bsam", "bsam-as-published"):
        for option in OPTIONS:
            yield Row(dtype, grad_dtype, "adamw", method, option)
    # What kernels cannot walk: the reference steps it on the GPU, in hundreds of torch's kernels.
    for layout in ("sizes", "strided"):
        yield Row(dtype, grad_dtype, "adamw", "wsam", "clip", layout)
    if dtype.itemsize >= torch.float32.itemsize:
        yield Row(dtype, grad_dtype, FOREIGN, "wsam", "plain")
        return
    for keeping in keepings_of(dtype):
        for base in ("sgd-l2", "nesterov", "adamw", "adamw-amsgrad"):
            for option in ("plain", "adaptive", "fisher"):
                yield Row(dtype, grad_dtype, base, "wsam", option, keeping=keeping)
        yield Row(dtype, grad_dtype, "adamw", "bsam-as-published", "plain", keeping=keeping)


def parameters(row: Row, device: torch.device) -> list[torch.nn.Parameter]:
    """Return the tensors of a row, with the same values on every device."""
    torch.manual_seed(0)
    tensors = LAYOUTS[row.layout](row.dtype)
    if device.type != "cpu":
        tensors = [moved(tensor, device) for tensor in tensors]
    return [torch.nn.Parameter(tensor) for tensor in tensors]


def compare(row: Row, backend: str, device: torch.device) -> int:
    """Make some steps and compare with the reference within and after each.

    Returns:
        The number of steps.

    Raises:
        AssertionError: Something differs.
    """
    base = {**BASES, **FOREIGN_BASES}[row.base]
    options = {**OPTIONS[row.option], **KEEPING.get(row.keeping, {})}
    ours, reference = (
        METHODS[row.method](parameters(row, where), base, backend=name, **options)
        for where, name in ((device, backend), (torch.device("cpu"), "eager"))
    )
    for number in range(STEPS):
        step_both(ours, reference, row.dtype, number, (row.grad_dtype, row.grad_dtype))
    return STEPS


def run(backend: str, device: torch.device) -> tuple[int, int]:
    """Compare all rows of the dtypes that a backend supports and print what differs.

    Returns:
        The number of steps compared, and of rows that differ.
    """
    steps = bad = 0
    warnings.filterwarnings("ignore", "gradients are float16")  # of these none vanishes
    for dtype, grad_dtype in PAIRS:
        supported = BACKENDS[backend].DTYPES
        lower = BACKENDS[backend].GRADIENT_DTYPES.get(dtype, ())
        if (supported and dtype not in supported) or grad_dtype not in (dtype, *lower):
            continue
        before = steps, bad
        for row in rows(dtype, grad_dtype):
            try:
                steps += compare(row, backend, device)
            except (AssertionError, RuntimeError, ValueError) as error:
                bad += 1
                print(f"{backend}: {row} differs or fails: {error}", file=sys.stderr)
        names = [str(d).removeprefix("torch.") for d in (dtype, grad_dtype)]
        print(
            f"{backend}, parameters {names[0]}, gradients {names[1]}: "
            f"{steps - before[0]} steps, {bad - before[1]} rows differ",
            flush=True,
        )
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
