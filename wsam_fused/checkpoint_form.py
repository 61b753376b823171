"""Whether something has the form of a checkpoint at all, found out before anything else reads it.

A checkpoint may come from anywhere. ``torch.optim.Optimizer.load_state_dict`` looks at the numbers
of groups and parameters only; what it does not expect it takes over, or stumbles on half-way.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_EXPECTED = "expected what state_dict() returns: a dict with 'state' and 'param_groups'"


def check_form(state_dict: object, *, groups: int, takes_others: bool) -> None:
    """Validate the outermost layers of a checkpoint; its values are for others to check.

    Args:
        state_dict: What was given to ``load_state_dict``.
        groups: How many parameter groups the optimizer has.
        takes_others: Whether the state may have entries under names, besides those of parameters;
            base optimizers that are stepped as they are may keep something there.

    Raises:
        TypeError: A layer is of another type.
        ValueError: Something is missing, comes twice or belongs to no parameter.
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict is of type {_type(state_dict)}, {_EXPECTED}")
    for key in ("state", "param_groups"):
        if key not in state_dict:
            raise ValueError(f"state_dict has no {key!r}, {_EXPECTED}")
    saved = state_dict["param_groups"]
    if not isinstance(saved, list | tuple):
        raise TypeError(f"'param_groups' of state_dict is of type {_type(saved)}, expected a list")
    if len(saved) != groups:
        raise ValueError(f"the checkpoint has {len(saved)} parameter groups, expected {groups}")
    listed: set[Any] = set()
    for number, group in enumerate(saved):
        _check_group(number, group, listed)
    state = state_dict["state"]
    if not isinstance(state, Mapping):
        raise TypeError(f"'state' of state_dict is of type {_type(state)}, expected a dict")
    for index, entry in state.items():
        if index not in listed:
            if takes_others and isinstance(index, str):
                continue
            raise ValueError(
                f"the checkpoint has a state for parameter {index!r}, which none of its groups has"
            )
        if not isinstance(entry, Mapping):
            raise TypeError(
                f"the state of parameter {index!r} is of type {_type(entry)}, expected a dict"
            )


def _check_group(number: int, group: object, listed: set[Any]) -> None:
    """Validate one group and add its parameters to those ``listed``."""
    what = f"parameter group {number} of the checkpoint"
    if not isinstance(group, Mapping):
        raise TypeError(f"{what} is of type {_type(group)}, expected a dict")
    if "params" not in group:
        raise ValueError(f"{what} has no 'params', expected a list of their numbers or names")
    params = group["params"]
    if not isinstance(params, list | tuple):
        raise TypeError(f"'params' of {what} is of type {_type(params)}, expected a list")
    for index in params:
        if not isinstance(index, int | str):
            raise TypeError(
                f"'params' of {what} has an entry of type {_type(index)}, expected numbers or names"
            )
        if index in listed:
            raise ValueError(f"{what} has parameter {index!r} again, expected each once")
        listed.add(index)
    names = group.get("param_names")
    if names is None:
        return
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"'param_names' of {what} is {names!r}, expected a list of names")
    if len(names) != len(params):
        raise ValueError(f"{what} has {len(names)} 'param_names', expected {len(params)}")


def _type(value: object) -> str:
    return type(value).__name__
