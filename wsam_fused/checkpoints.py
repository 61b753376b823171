"""What saving and loading a checkpoint need besides what torch does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from wsam_fused.precision import LOW_PRECISION, MASTER_KEY, Precision


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


def keep_wide_states(
    optimizer: Optimizer, state_dict: dict[str, Any], precision: Precision
) -> None:
    """Take the float32 states of low-precision parameters from a checkpoint again.

    ``torch.optim.Optimizer.load_state_dict`` has rounded them to the dtype of the parameters.
    Float32 weights that the optimizer does not keep are left out.

    Args:
        optimizer: Has just loaded the checkpoint.
        state_dict: The checkpoint.
        precision: How the optimizer keeps 16-bit parameters.
    """
    saved = [index for group in state_dict["param_groups"] for index in group["params"]]
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for index, param in zip(saved, params, strict=True):
        if param.dtype not in LOW_PRECISION:
            continue
        for key, value in state_dict["state"].get(index, {}).items():
            if key == MASTER_KEY and not precision.keeps_master(param.dtype):
                del optimizer.state[param][key]
            elif isinstance(value, Tensor) and key != "step":
                is_master = key == MASTER_KEY
                dtype = torch.float32 if is_master else precision.state_dtype(param.dtype)
                wide = value.detach().to(param.device, dtype, copy=True)
                optimizer.state[param][key] = wide
