"""Takes a base optimizer in any of the forms that users have it in."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from wsam_fused.base_rules import has_fused_update
from wsam_fused.groups import check_values
from wsam_fused.zero_redundancy import check_steps

_NEEDS_CLOSURE = (torch.optim.LBFGS,)
_SPARSE_ONLY = (torch.optim.SparseAdam,)

BaseOptimizer = type[Optimizer] | Optimizer | Callable[..., Optimizer]


class Base(NamedTuple):
    """A base optimizer.

    Attributes:
        optimizer: An instance over the parameters; its groups and state become ours.
        rule_class: Its class where that has a fused update, else None.
    """

    optimizer: Optimizer
    rule_class: type[Optimizer] | None


def resolve(
    params: Iterable[Any],
    base_optimizer: BaseOptimizer,
    kwargs: dict[str, Any],
) -> Base:
    """Build or adopt the base optimizer.

    Args:
        params: Parameters, named parameters or parameter groups, as ``torch.optim`` takes them.
        base_optimizer: A class, a ``functools.partial`` of one, or an instance over the same
            parameters.
        kwargs: Arguments of the class.

    Raises:
        TypeError: ``base_optimizer`` is none of these, or cannot be a base optimizer.
        ValueError: ``params`` is empty or not what the instance holds, or an argument is out of
            range.
    """
    if isinstance(params, Tensor):
        raise TypeError("params is a Tensor, expected an iterable of tensors or groups")
    listed = list(params)
    if not listed:
        raise ValueError("params is empty, expected at least one parameter")
    if isinstance(base_optimizer, Optimizer):
        _check_instance(base_optimizer, listed, kwargs)
        base = base_optimizer
    else:
        built_class = base_optimizer
        if isinstance(base_optimizer, functools.partial):
            built_class = base_optimizer.func
        if not (isinstance(built_class, type) and issubclass(built_class, Optimizer)):
            raise TypeError(
                f"base_optimizer is {base_optimizer!r}, expected a torch.optim.Optimizer class, "
                "a functools.partial of one, or an instance"
            )
        check_values(kwargs)
        base = base_optimizer(listed, **kwargs)
    _check_supported(base)
    return Base(base, type(base) if has_fused_update(type(base)) else None)


def _check_supported(base: Optimizer) -> None:
    name = type(base).__name__
    if isinstance(base, _NEEDS_CLOSURE):
        raise TypeError(
            f"base_optimizer is {name}, which evaluates the loss itself; "
            "expected an optimizer whose step() needs no closure"
        )
    if isinstance(base, _SPARSE_ONLY):
        raise TypeError(f"base_optimizer is {name}, which needs sparse gradients; expected dense")
    if any(group.get("differentiable") for group in base.param_groups):
        raise ValueError("differentiable is True, expected False: the step is not differentiable")
    check_steps(base)


def _check_instance(base: Optimizer, params: list[Any], kwargs: dict[str, Any]) -> None:
    if kwargs:
        names = ", ".join(sorted(kwargs))
        raise TypeError(
            f"base_optimizer is an instance, which has its arguments already; unexpected: {names}"
        )
    wanted = {id(p) for p in _flat(params)}
    held = {id(p) for group in base.param_groups for p in group["params"]}
    if wanted != held:
        raise ValueError(
            f"params has {len(wanted)} parameters, expected the {len(held)} of base_optimizer"
        )


def _flat(params: list[Any]) -> Iterable[Tensor]:
    for item in params:
        if isinstance(item, dict):
            inner = item["params"]
            yield from _flat([inner] if isinstance(inner, Tensor) else list(inner))
        else:
            yield item[1] if isinstance(item, tuple) else item
