"""The cases of the GPU report: which there are, in which order, and what fits into the memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from benchmarks.common import Shape, count_of, shapes_of
from benchmarks.contenders import BASES, GPU_CONTENDERS, Base, Contender, Ours
from benchmarks.gpu.clock import CopyBuffer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# The figures wanted depend on these; a run out of time leaves out the others first.
_SHAPES_BY_IMPORTANCE = ("8x4096x1024", "gpt2-small", "2000x64", "llama-1b", "resnet18")
# What the allocator may lose to the cutting of blocks.
_USABLE = 0.95


class Case(NamedTuple):
    """A shape list, a base optimizer and a dtype, all by name."""

    shapes: str
    base: str
    dtype: str

    @property
    def sizes(self) -> list[Shape]:
        """The shapes of the parameters."""
        return shapes_of(self.shapes)

    @property
    def parameters(self) -> int:
        """The number of parameters."""
        return count_of(self.sizes)

    @property
    def base_optimizer(self) -> Base:
        """The base optimizer."""
        return BASES[self.base]

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of parameters and gradients."""
        return DTYPES[self.dtype]

    def __str__(self) -> str:
        return f"{self.shapes}, {self.base}, {self.dtype}"


def plan(shapes: Sequence[str], bases: Sequence[str], dtypes: Sequence[str]) -> list[Case]:
    """Return all cases, the most important first."""

    def importance(case: Case) -> tuple[bool, bool, int]:
        known = case.shapes in _SHAPES_BY_IMPORTANCE
        place = _SHAPES_BY_IMPORTANCE.index(case.shapes) if known else len(_SHAPES_BY_IMPORTANCE)
        return (case.dtype != "float32", case.base != "AdamW", place)

    cases = [Case(s, base, dtype) for s in shapes for base in bases for dtype in dtypes]
    return sorted(cases, key=importance)


def needed_bytes(case: Case, names: Sequence[str]) -> int:
    """Estimate the memory of a case, in which all contenders' lasting lists exist side by side.

    Those that keep the state in the parameters' dtype share it; ours with float32 states of
    parameters of low precision have their own.
    """
    count, size = case.parameters, case.torch_dtype.itemsize
    classes = [GPU_CONTENDERS[name] for name in names]
    lists = 4  # parameters, g1, g2 and the values that g2 is refilled from
    lists += case.base_optimizer.states + sum(cls.resident_lists for cls in classes)
    lists += max((cls.temporary_lists for cls in classes), default=0)
    own_states = 0
    if size < torch.float32.itemsize:
        ours = sum(issubclass(cls, Ours) for cls in classes)
        own_states = ours * case.base_optimizer.states * torch.float32.itemsize
    return count * (lists * size + own_states)


def too_big(case: Case, names: Sequence[str], free: int | None) -> dict[str, str]:
    """Choose who is left out so that the others fit into the memory.

    Args:
        case: What is measured.
        names: Who would take part.
        free: Free bytes; None if it is not known, then nobody is left out.

    Returns:
        The reason for everyone who is left out.
    """
    if free is None:
        return {}

    def scratch(name: str) -> int:
        cls: type[Contender] = GPU_CONTENDERS[name]
        return cls.resident_lists + cls.temporary_lists

    usable = _USABLE * free - 2 * CopyBuffer.size_for(free)
    left = sorted(names, key=scratch)
    reasons: dict[str, str] = {}
    while left and (needed := needed_bytes(case, left)) > usable:
        reasons[left.pop()] = (
            f"does not fit: needs about {needed / 2**30:.0f} GiB beside the others, "
            f"{usable / 2**30:.0f} GiB can be had"
        )
    return reasons
