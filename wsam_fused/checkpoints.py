"""What saving and loading a checkpoint need besides what torch does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from wsam_fused.tensor_list import LOW_PRECISION, state_dtype


def without_unused_buffers(
    packed: dict[str, Any], params: Sequence[Tensor], step_counts: Mapping[Tensor, float]
) -> None:
    """Take momentum buffers out of a checkpoint that no step has used yet.

    torch tells by this that the next step is the first, which is not dampened.

    Args:
        packed: The checkpoint; its entries are in the order of ``params``.
        params: All parameters.
        step_counts: Updates that each has had; one that is missing counts as updated.
    """
    for position, param in enumerate(params):
        entry = packed["state"].get(position, {})
        if "momentum_buffer" in entry and not step_counts.get(param, 1.0):
            packed["state"][position] = {**entry, "momentum_buffer": None}


def with_missing_keys(
    state_dict: dict[str, Any], groups: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Give the groups of a checkpoint the values that they lack, from ``groups``."""
    saved = state_dict["param_groups"]
    if len(saved) != len(groups):
        return state_dict  # torch refuses it
    merged = [
        {**{k: v for k, v in now.items() if k != "params"}, **group}
        for now, group in zip(groups, saved, strict=True)
    ]
    return {**state_dict, "param_groups": merged}


def keep_wide_states(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    """Take the float32 states of low-precision parameters from a checkpoint again.

    ``torch.optim.Optimizer.load_state_dict`` has rounded them to the dtype of the parameters.

    Args:
        optimizer: Has just loaded the checkpoint.
        state_dict: The checkpoint.
    """
    saved = [index for group in state_dict["param_groups"] for index in group["params"]]
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for index, param in zip(saved, params, strict=True):
        if param.dtype not in LOW_PRECISION:
            continue
        for key, value in state_dict["state"].get(index, {}).items():
            if isinstance(value, Tensor) and key != "step":
                wide = value.detach().to(param.device, state_dtype(param), copy=True)
                optimizer.state[param][key] = wide
