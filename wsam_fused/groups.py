"""What a parameter group contributes to a step, and checks of its values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from wsam_fused.arguments import number
from wsam_fused.base_rules import BaseRule, device_learning_rate, hyper_of
from wsam_fused.plan import GroupRow
from wsam_fused.row import Row


def group_row(
    group: Mapping[str, Any], rule: BaseRule, row: Row, rho: Any, eps: float, max_norm: float
) -> GroupRow:
    """Return the columns of the group table for one group.

    Args:
        group: The group, with the keys of the base optimizer.
        rule: Its base rule.
        row: The method's coefficients for this group.
        rho: The group's radius.
        eps: Added to the norm that rho is divided by.
        max_norm: Clipping threshold of each gradient's norm; negative is none.
    """
    sign = -1.0 if group.get("maximize") else 1.0
    # The kernels multiply h by the sign; a foreign optimizer does it itself, so take it out.
    undo = sign if rule == BaseRule.NONE else 1.0
    h1, h2, h3 = row.h
    h = (undo * h1, undo * h2, undo * h3)
    return GroupRow(float(rho), eps, max_norm, sign, *h, *row.d, *hyper_of(rule, group))


def check_values(group: Mapping[str, Any]) -> None:
    """Validate the base optimizer's numbers that decide whether a step makes sense."""
    for name in ("lr", "weight_decay", "momentum"):
        on_device = name == "lr" and device_learning_rate(group) is not None
        if name in group and not on_device:
            number(name, group[name], 0.0)


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


def _overlaps_itself(param: Tensor) -> bool:
    """Whether two elements are one place in memory, as after ``expand``."""
    extents = zip(param.stride(), param.shape, strict=True)
    return any(stride == 0 and size > 1 for stride, size in extents)
