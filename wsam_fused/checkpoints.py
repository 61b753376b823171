"""What loading a checkpoint needs besides what torch does."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from wsam_fused.tensor_list import LOW_PRECISION, state_dtype


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
