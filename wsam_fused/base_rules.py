"""Which torch optimizers have a fused update, and what of their groups the update needs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from enum import IntEnum
from typing import Any, NamedTuple

import torch
from torch import Tensor

from wsam_fused.arguments import flag, host_number, number


class BaseRule(IntEnum):
    """Base rules that the kernels know; the values are those of ``csrc/plan.h``.

    ``NONE`` leaves the step to a foreign optimizer: it writes h and d over the gradients.
    """

    NONE = 0
    SGD = 1
    MOMENTUM = 2
    ADAM = 3
    AMSGRAD = 4

    @property
    def state_keys(self) -> tuple[str, ...]:
        """Keys of the state tensors, named and ordered as in ``torch.optim``."""
        return _STATE_KEYS[self]

    @property
    def keeps_step(self) -> bool:
        """Whether ``torch.optim`` keeps ``step`` in the state of this rule."""
        return self in (BaseRule.ADAM, BaseRule.AMSGRAD)


_STATE_KEYS: dict[BaseRule, tuple[str, ...]] = {
    BaseRule.NONE: (),
    BaseRule.SGD: (),
    BaseRule.MOMENTUM: ("momentum_buffer",),
    BaseRule.ADAM: ("exp_avg", "exp_avg_sq"),
    BaseRule.AMSGRAD: ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
}


class Hyper(NamedTuple):
    """The hyper-parameters of a base rule, as the last columns of the group table."""

    lr: float
    l2: float
    decay: float
    beta1: float
    beta2: float
    eps: float
    nesterov: float


def has_fused_update(base_class: type) -> bool:
    """Whether ``base_class`` is stepped by our update; a subclass may step differently."""
    return base_class in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)


def rule_of(base_class: type, group: Mapping[str, Any]) -> BaseRule:
    """Return the rule that steps ``group`` as ``base_class`` would."""
    if base_class is torch.optim.SGD:
        return BaseRule.MOMENTUM if group["momentum"] else BaseRule.SGD
    if base_class in (torch.optim.Adam, torch.optim.AdamW):
        return BaseRule.AMSGRAD if group["amsgrad"] else BaseRule.ADAM
    return BaseRule.NONE


def check_base(base_class: type, group: Mapping[str, Any]) -> None:
    """Validate what our update reads of a group of ``base_class``, which has a fused update.

    ``lr``, ``weight_decay`` and ``momentum`` are checked with those of any other optimizer.

    Raises:
        TypeError: A value is of another type.
        ValueError: It is out of range.
    """
    if base_class is torch.optim.SGD:
        flags: tuple[str, ...] = ("nesterov", "maximize")
        number("dampening", group["dampening"], -math.inf)
    else:
        flags = ("amsgrad", "maximize", "decoupled_weight_decay")
        betas = group["betas"]
        if not isinstance(betas, list | tuple) or len(betas) != 2:
            raise ValueError(f"betas is {betas!r}, expected two numbers in [0, 1)")
        for beta in betas:
            number("betas", beta, 0.0, 1.0, high_included=False)
        number("eps", group["eps"], 0.0)
    for name in flags:
        flag(name, group[name])


def device_learning_rate(group: Mapping[str, Any]) -> Tensor | None:
    """Return the learning rate if it is a tensor that the host cannot read without waiting."""
    lr = group.get("lr")
    return lr if isinstance(lr, Tensor) and lr.device.type != "cpu" else None


def hyper_of(rule: BaseRule, group: Mapping[str, Any]) -> Hyper:
    """Read what ``rule`` needs from ``group``; numbers may be one-element tensors.

    A learning rate that only a device knows is NaN here.

    Raises:
        TypeError: Another number is a tensor on a device.
    """
    # One NaN object for all: rows that hold it compare equal.
    lr = math.nan if device_learning_rate(group) is not None else float(group["lr"])
    if rule == BaseRule.NONE:
        return Hyper(lr, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    weight_decay = host_number("weight_decay", group["weight_decay"])
    if rule in (BaseRule.SGD, BaseRule.MOMENTUM):
        momentum = host_number("momentum", group["momentum"])
        dampening = host_number("dampening", group["dampening"])
        return Hyper(lr, weight_decay, 0.0, momentum, dampening, 0.0, float(group["nesterov"]))
    beta1, beta2 = (host_number("betas", beta) for beta in group["betas"])
    eps = host_number("eps", group["eps"])
    l2, decay = (0.0, weight_decay) if group["decoupled_weight_decay"] else (weight_decay, 0.0)
    return Hyper(lr, l2, decay, beta1, beta2, eps, 0.0)
