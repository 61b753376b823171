"""Cuts lists of parameters so that their gradients are complete one list after the other."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from wsam_fused.distributed import local_of
from wsam_fused.tensor_list import ListKey

# A parameter, its group, and which parameter of the optimizer it is.
Member = tuple[Tensor, int, int]

# Small parameters share a list as long as they are together at most this part of the largest one:
# lists of single biases would cost launches, and large ones keep their gradients for long.
_SHARE = 4


def in_buckets(members: Mapping[ListKey, list[Member]]) -> dict[ListKey, list[Member]]:
    """Give every large parameter a list of its own, and a few small neighbours one together.

    Args:
        members: What can be stepped together, in the order of the model. A backward completes
            gradients in about the opposite order.

    Returns:
        The same under keys with bucket numbers, which count from 1.
    """
    sizes = [_bytes(param) for list_ in members.values() for param, _, _ in list_]
    limit = max(sizes, default=0) // _SHARE
    found: dict[ListKey, list[Member]] = {}
    number = 0
    for key, list_ in members.items():
        small: list[Member] = []
        used = 0
        for member in list_:
            size = _bytes(member[0])
            if size > limit or not small or used + size > limit:
                number += 1
                bucket = found[key._replace(bucket=number)] = [member]
                if size <= limit:
                    small, used = bucket, size
            else:
                small.append(member)
                used += size
    return found


def _bytes(param: Tensor) -> int:
    local = local_of(param)
    return local.numel() * local.element_size()
