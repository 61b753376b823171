"""What saving and loading a checkpoint need besides what torch does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from wsam_fused.base_rules import BaseRule
from wsam_fused.distributed import is_dtensor, local_of
from wsam_fused.precision import LOW_PRECISION, MASTER_KEY, Precision

if TYPE_CHECKING:
    from wsam_fused.method_optimizer import MethodOptimizer


def without_unused_buffers(
    packed: dict[str, Any],
    groups: Sequence[Mapping[str, Any]],
    step_counts: Mapping[Tensor, float],
) -> None:
    """Take momentum buffers out of a checkpoint that no step has used yet.

    torch tells by this that the next step is the first, which is not dampened. Without dampening
    the zeros say the same, and of a DTensor all ranks have to save the same.

    Args:
        packed: The checkpoint; its entries are in the order of the parameters.
        groups: All parameter groups.
        step_counts: Updates that each parameter has had; one that is missing counts as updated.
    """
    pairs = ((group, param) for group in groups for param in group["params"])
    for position, (group, param) in enumerate(pairs):
        entry = packed["state"].get(position, {})
        matters = bool(group.get("dampening")) and not is_dtensor(param)
        if matters and "momentum_buffer" in entry and not step_counts.get(param, 1.0):
            packed["state"][position] = {**entry, "momentum_buffer": None}


def with_plain_numbers(packed: dict[str, Any]) -> dict[str, Any]:
    """Replace numbers of other libraries in the groups of a checkpoint by Python's own.

    ``torch.load`` with ``weights_only=True`` refuses the ``numpy.float64`` that a user or a
    scheduler has computed.
    """
    groups = [{key: _plain(value) for key, value in g.items()} for g in packed["param_groups"]]
    return {**packed, "param_groups": groups}


def _plain(value: Any) -> Any:
    if type(value) in (list, tuple):
        return type(value)(map(_plain, value))
    if type(value) is bool or not isinstance(value, Real):
        return value
    return int(value) if isinstance(value, Integral) else float(value)


def with_missing_keys(
    state_dict: dict[str, Any], groups: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Give the groups of a checkpoint the values that they lack, from ``groups``."""
    saved = state_dict["param_groups"]
    merged = [
        {**{k: v for k, v in now.items() if k != "params"}, **group}
        for now, group in zip(groups, saved, strict=True)
    ]
    return {**state_dict, "param_groups": merged}


@contextmanager
def all_or_nothing(optimizer: MethodOptimizer) -> Iterator[None]:
    """Let loading a checkpoint change everything, or nothing if it fails."""
    base = optimizer._base
    before = {one: dict(vars(one)) for one in (optimizer, base)}
    try:
        yield
    except BaseException:
        for one, attributes in before.items():
            vars(one).clear()
            vars(one).update(attributes)
        raise


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
            optimizer.state.get(param, {}).pop(MASTER_KEY, None)
            continue
        for key, value in state_dict["state"].get(index, {}).items():
            if key == MASTER_KEY and not precision.keeps_master(param.dtype):
                del optimizer.state[param][key]
            elif isinstance(value, Tensor) and key != "step":
                is_master = key == MASTER_KEY
                dtype = torch.float32 if is_master else precision.state_dtype(param.dtype)
                wide = value.detach().to(param.device, dtype, copy=True)
                optimizer.state[param][key] = wide


def create_state(optimizer: MethodOptimizer) -> bool:
    """Create the whole state, if that is what a step without closure is for.

    ``torch.distributed.checkpoint`` wants a state to load into and makes an optimizer that has none
    step with gradients of 0 and a learning rate of 0.

    Returns:
        Whether it is that.
    """
    if not is_request_for_state(optimizer.param_groups, optimizer.state):
        return False
    if optimizer._rule_class is None:
        optimizer._base.step()
        return True
    for tensors in optimizer._current_engine().lists.lists:
        if tensors.key.rule == BaseRule.MOMENTUM:  # it counts as used, as in torch
            tensors.steps.fill_(1.0)
    return True


def is_request_for_state(groups: Sequence[Mapping[str, Any]], state: Mapping[Tensor, Any]) -> bool:
    """Whether a step would change nothing, and there is no state yet.

    All learning rates are 0, and all gradients that can be are there and 0; waits for the device
    only if the rates are.
    """
    params = [p for group in groups for p in group["params"] if p.requires_grad]
    rates = [group.get("lr", 0.0) for group in groups]
    return (
        not state
        and bool(params)
        and not any(isinstance(rate, Tensor) and rate.device.type != "cpu" for rate in rates)
        and not any(map(float, rates))
        and all(p.grad is not None and not bool(local_of(p.grad).any()) for p in params)
    )
