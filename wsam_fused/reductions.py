"""Norms and dot products over all parameters: over lists, over devices and over ranks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from wsam_fused.backends import Backend
from wsam_fused.plan import Slot
from wsam_fused.sums_over_ranks import SumsOverRanks
from wsam_fused.tensor_list import TensorList
from wsam_fused.tensor_lists import TensorLists

# Which slots one reduction gives, by evaluation.
SLOTS = (
    slice(Slot.METRIC_SQ, Slot.GRAD1_SQ + 1),
    slice(Slot.GRAD2_SQ, Slot.GRAD2_SQ + 1),
    slice(Slot.GRAD3_SQ, Slot.GRAD3_SQ + 1),
)
_DOT = slice(Slot.DOT12, Slot.DOT12 + 1)


def reduce(
    lists: TensorLists, evaluation: int, *, with_first: bool, has_gradients: bool
) -> Tensor | None:
    """Form the sums over the gradients of one evaluation.

    Args:
        lists: The parameters.
        evaluation: Which gradients, 0 for g1.
        with_first: Also form their dot product with g1.
        has_gradients: Whether this rank has any.

    Returns:
        How many ranks have any, of those that have a part of some parameter; a scalar on the
        device. None where no parameter is distributed.
    """
    slots = [SLOTS[evaluation], *([_DOT] if with_first else [])]
    if lists.over_ranks is None:
        _reduce(lists, lists, evaluation, slots)
        return None
    return _reduce_over_ranks(lists, lists.over_ranks, evaluation, slots, has_gradients)


def _reduce(
    lists: TensorLists,
    members: Iterable[tuple[TensorList, Backend]],
    evaluation: int,
    slots: Sequence[slice],
    *,
    accumulate: bool = False,
) -> None:
    begun = set()
    for tensors, backend in members:
        backend.reduce(
            tensors,
            evaluation,
            with_first=_DOT in slots,
            accumulate=accumulate or tensors.key.device in begun,
        )
        begun.add(tensors.key.device)
    for each in slots:
        lists.sum_over_devices(each)


def _reduce_over_ranks(
    lists: TensorLists,
    over_ranks: SumsOverRanks,
    evaluation: int,
    slots: Sequence[slice],
    has_gradients: bool,
) -> Tensor:
    """Form the sums for every kind of sharding, and add up what the ranks have.

    A rank without gradients takes part, or the others would wait for it.
    """
    scalars = lists.primary.scalars
    parts = []
    for sharding in over_ranks.shardings:
        lists.clear(slots)
        members = [pair for pair in lists if pair[0].key.sharding == sharding]
        _reduce(lists, members, evaluation, slots, accumulate=True)
        exist = torch.full_like(scalars[:1], float(has_gradients))
        parts.append(torch.cat([*(scalars[each] for each in slots), exist]))
    total = over_ranks.total(parts)
    for shared in lists.shared.values():
        begin = 0
        for each in slots:
            end = begin + each.stop - each.start
            shared.scalars[each].copy_(total[begin:end])
            begin = end
    return total[-1]
