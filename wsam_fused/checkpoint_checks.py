"""Whether a checkpoint is of this optimizer, found out before anything of it is taken over."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from wsam_fused.arguments import number
from wsam_fused.base_rules import BaseRule
from wsam_fused.distributed import local_of
from wsam_fused.method_keys import METHOD, STEP
from wsam_fused.parameters import sharing_memory
from wsam_fused.precision import LOW_PRECISION, MASTER_KEY

# Keys that torch gave its optimizers later; they are no sign of another one where they are missing.
_ADDED_BY_TORCH = {
    "foreach",
    "maximize",
    "capturable",
    "differentiable",
    "fused",
    "decoupled_weight_decay",
}

# States that an option brings: none has them if it was switched on after the last step.
_SWITCHED_ON = ("momentum_buffer", "max_exp_avg_sq")

RuleOf = Callable[[Mapping[str, Any]], BaseRule]


def check_fits(state_dict: Mapping[str, Any], optimizer: Optimizer, base: Optimizer) -> None:
    """Validate the groups of a checkpoint of this optimizer or of its base optimizer.

    Args:
        state_dict: The checkpoint. How many groups and parameters it has is for torch to check.
        optimizer: What it is to be loaded into.
        base: Its base optimizer.

    Raises:
        ValueError: It is of another method or another base optimizer.
    """
    for saved, now in zip(state_dict["param_groups"], optimizer.param_groups, strict=False):
        method = saved.get(METHOD, now[METHOD])
        if method != now[METHOD]:
            raise ValueError(
                f"the checkpoint is of {method}, expected one of {now[METHOD]} or of its base "
                f"optimizer, {type(base).__name__}; to take it all the same, delete {METHOD!r} "
                "from its groups"
            )
        missing = sorted(base.defaults.keys() - saved.keys() - _ADDED_BY_TORCH)
        if missing:
            raise ValueError(
                f"the checkpoint is of another base optimizer than {type(base).__name__}: its "
                f"groups have no {', '.join(map(repr, missing))}"
            )
        kind = "decoupled_weight_decay"
        if saved.get(kind, now.get(kind)) != now.get(kind):
            raise ValueError(
                f"the checkpoint is of another base optimizer than {type(base).__name__}: "
                f"{kind} is {saved[kind]}, expected {now[kind]}"
            )


def check_group_values(
    groups: Sequence[Mapping[str, Any]], check_group: Callable[[dict[str, Any]], None]
) -> None:
    """Validate the numbers of a checkpoint's groups.

    Args:
        groups: The groups, with all keys.
        check_group: Raises if a value of a group cannot be used.

    Raises:
        TypeError: A value is of another type than it has to be.
        ValueError: It is out of range.
    """
    for group in groups:
        _check_count(f"{STEP} of the checkpoint", group[STEP])
        check_group(dict(group))


def _check_count(what: str, value: object) -> None:
    count = number(what, value, 0.0)
    if not count.is_integer():
        raise ValueError(f"{what} is {count!r}, expected a whole number")


def check_states(
    state_dict: Mapping[str, Any], groups: Sequence[Mapping[str, Any]], rule_of: RuleOf
) -> None:
    """Validate the states of a checkpoint for a base optimizer with a fused update.

    Args:
        state_dict: The checkpoint, with all keys in its groups.
        groups: Those of the optimizer.
        rule_of: Says which base rule a group of the checkpoint has.

    Raises:
        TypeError: A step count is no number.
        ValueError: A state is missing, has another shape or dtype than its parameter, or shares
            memory with another; or a step count is no whole number.
    """
    tensors: list[Tensor] = [local_of(param) for group in groups for param in group["params"]]
    for saved, group in zip(state_dict["param_groups"], groups, strict=False):
        entries = [
            {k: v for k, v in (state_dict["state"].get(index) or {}).items() if v is not None}
            for index in saved["params"]
        ]
        present = {key for entry in entries for key in entry}
        rule = rule_of(saved)
        wanted = [k for k in rule.state_keys if k in present or k not in _SWITCHED_ON]
        for index, entry, param in zip(saved["params"], entries, group["params"], strict=False):
            keys = wanted if entry.keys() - {MASTER_KEY} else []
            for key in [*keys, MASTER_KEY] if MASTER_KEY in entry else keys:
                _check_state(f"state {key!r} of parameter {index!r}", entry.get(key), param)
                tensors.append(local_of(entry[key]))
            if keys and rule.keeps_step:
                _check_count(f"state 'step' of parameter {index!r}", entry.get("step"))
    shared = sharing_memory(tensors)
    if shared is not None:
        raise ValueError(
            f"states or parameters of shapes {tuple(shared[0].shape)} and "
            f"{tuple(shared[1].shape)} share memory, expected each in memory of its own"
        )


def _check_state(what: str, value: object, param: Tensor) -> None:
    if not isinstance(value, Tensor):
        found = "missing" if value is None else type(value).__name__
        raise ValueError(f"{what} is {found}, expected a tensor of shape {tuple(param.shape)}")
    if value.shape != param.shape:
        raise ValueError(
            f"{what} is {tuple(value.shape)}, expected a tensor of shape {tuple(param.shape)}"
        )
    if value.layout != torch.strided or value.is_meta:
        found = "without data" if value.is_meta else str(value.layout)
        raise ValueError(f"{what} is {found}, expected an ordinary tensor")
    wide = torch.float32 if param.dtype in LOW_PRECISION else param.dtype
    allowed: dict[torch.dtype, None] = dict.fromkeys((wide, param.dtype))
    if value.dtype not in allowed:
        raise ValueError(f"{what} is {value.dtype}, expected {' or '.join(map(str, allowed))}")
