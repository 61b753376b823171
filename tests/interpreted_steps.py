"""Lists and steps for the Triton kernels under the interpreter, beside those of the reference.

Small lists, because the interpreter takes milliseconds for every tensor and operation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from cases import BASES, FOREIGN_BASES, METHODS
from comparison import GradientDtypes, step_both
from torch import Tensor

NAME = "triton-interpreted"
STEPS = 2
ALL_BASES = {**BASES, **FOREIGN_BASES}
Values = Callable[[torch.dtype], list[Tensor]]


def few(dtype: torch.dtype) -> list[Tensor]:
    """A scalar, an odd size, and more than a chunk of 1,024 with a ragged end."""
    return [torch.randn(shape, dtype=dtype) for shape in ((), (17, 3), (29, 40))]


def unaligned(dtype: torch.dtype) -> list[Tensor]:
    block = torch.randn(3300, dtype=dtype)
    return [block[1:18], block[19:1144], block[1145:1146], block[1147:3299]]


def around_chunks(dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(size, dtype=dtype) for size in (1024, 1, 1023, 64, 2049, 960, 3)]


def whole_chunks(dtype: torch.dtype) -> list[Tensor]:
    """Some chunks of one tensor each, which go in whole blocks, and a rest."""
    return [torch.randn(5 * 1024 + 3, dtype=dtype), torch.randn(2048, dtype=dtype)]


def strided(dtype: torch.dtype) -> list[Tensor]:
    picture = torch.randn(4, 3, 5, 5, dtype=dtype).to(memory_format=torch.channels_last)
    return [torch.randn(8, 6, dtype=dtype).t(), picture, torch.randn(10, 20, dtype=dtype)[:, ::2]]


def tiny(dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(1 + i % 5, dtype=dtype) for i in range(24)]


def pair_of_lists(values: Values, dtype: torch.dtype) -> list[list[torch.nn.Parameter]]:
    lists = []
    for _ in range(2):
        torch.manual_seed(1)
        lists.append([torch.nn.Parameter(tensor) for tensor in values(dtype)])
    return lists


def check(
    method: str,
    base: str,
    values: Values = few,
    dtype: torch.dtype = torch.float32,
    gradients: GradientDtypes = (None, None),
    **options: Any,
) -> None:
    """Make steps with the kernels and with the reference, and compare after each."""
    mine, theirs = pair_of_lists(values, dtype)
    ours = METHODS[method](mine, ALL_BASES[base], backend=NAME, **options)
    reference = METHODS[method](theirs, ALL_BASES[base], backend="eager", **options)
    before = mine[-1].detach().clone()
    for number in range(STEPS):
        step_both(ours, reference, dtype, number, gradients)
    assert not torch.equal(mine[-1], before), "the comparison would pass by doing nothing"
