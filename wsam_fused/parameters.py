"""What parameters have to be like, alone and beside each other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

from torch import Tensor


def is_dense(param: Tensor) -> bool:
    """Whether the elements of ``param`` fill one block of memory, in whatever order."""
    expected = 1
    for stride, size in sorted(zip(param.stride(), param.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


def check_params(params: Sequence[Tensor]) -> None:
    """Validate the parameters of a group.

    Raises:
        TypeError: One is complex.
        ValueError: One comes twice, or its elements share memory.
    """
    if len({id(param) for param in params}) != len(params):
        raise ValueError("params has a parameter twice in one group, expected each once")
    for param in params:
        shape = tuple(param.shape)
        if param.is_complex():
            raise TypeError(f"params has a {param.dtype} parameter of shape {shape}, expected real")
        if _overlaps_itself(param):
            raise ValueError(
                f"params has a parameter of shape {shape} whose elements share memory; "
                "expected each element in a place of its own"
            )


def check_separate(params: Iterable[Tensor]) -> None:
    """Validate that no two parameters have the same memory: they would be updated at the same time.

    Those that are not dense are left out: they may lie between each other's elements.

    Raises:
        ValueError: Two have.
    """
    found = sharing_memory(params)
    if found is not None:
        param, other = found
        raise ValueError(
            f"params has parameters of shapes {tuple(param.shape)} and {tuple(other.shape)} "
            "that share memory; expected each in memory of its own. To tie weights, use one "
            "Parameter in both places"
        )


def sharing_memory(tensors: Iterable[Tensor]) -> tuple[Tensor, Tensor] | None:
    """Return two dense tensors that have the same memory, if there are any."""
    blocks = [(str(t.device), t.data_ptr(), t) for t in tensors if t.numel() and is_dense(t)]
    blocks.sort(key=lambda block: block[:2])
    for (device, start, tensor), (other_device, other_start, other) in pairwise(blocks):
        end = start + tensor.numel() * tensor.element_size()
        if start and device == other_device and other_start < end:
            return tensor, other
    return None


def _overlaps_itself(param: Tensor) -> bool:
    """Whether two elements are one place in memory, as after ``expand``."""
    extents = zip(param.stride(), param.shape, strict=True)
    return any(stride == 0 and size > 1 for stride, size in extents)
