"""What a parameter group contributes to a step, and checks of its values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from wsam_fused.arguments import host_number, number
from wsam_fused.base_rules import BaseRule, device_learning_rate, hyper_of
from wsam_fused.plan import GroupRow
from wsam_fused.row import DERIVED, Row


def group_row(
    group: Mapping[str, Any],
    rule: BaseRule,
    row: Row,
    own: Mapping[str, Any],
    eps: float,
    max_norm: float,
) -> GroupRow:
    """Return the columns of the group table for one group.

    Args:
        group: The group, with the keys of the base optimizer.
        rule: Its base rule.
        row: The method's coefficients for this group.
        own: The method's hyper-parameters in this group; those that say where the points of a step
            are (``rho``, ``rho_min``, ``delta``, ``eta``) have columns of their own.
        eps: Added to the norm that the radii are divided by.
        max_norm: Clipping threshold of each gradient's norm; negative is none.
    """
    sign = -1.0 if group.get("maximize") else 1.0
    # The kernels multiply h by the sign; a foreign optimizer does it itself, so take it out.
    undo = -1.0 if rule == BaseRule.NONE and sign < 0 else 1.0
    h1, h2, h3 = (c if c is DERIVED else undo * c for c in row.h)

    def place(name: str) -> float:
        return host_number(name, own.get(name, 0.0))

    places = place("rho"), place("rho_min"), place("delta"), place("eta")
    return GroupRow(*places, eps, max_norm, sign, h1, h2, h3, *row.d, *hyper_of(rule, group))


def check_values(group: Mapping[str, Any]) -> None:
    """Validate the base optimizer's numbers that decide whether a step makes sense."""
    for name in ("lr", "weight_decay", "momentum"):
        on_device = name == "lr" and device_learning_rate(group) is not None
        if name in group and not on_device:
            number(name, group[name], 0.0)
