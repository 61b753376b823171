"""What is asked of a model and its loss: which parameters, the value, the gradient."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from wsam_fused.autocast import forget_casts
from wsam_fused.distributed import check_distributed, is_dtensor
from wsam_fused.landscape.as_found import SameStart

Loss = Callable[[], Tensor]


def loss_functions(name: str, loss: Loss | Sequence[Loss], at_least: int = 1) -> list[Loss]:
    """Return the functions whose mean is the loss.

    Args:
        name: How the user calls the argument.
        loss: One function or a sequence of them.
        at_least: How many there have to be.

    Raises:
        TypeError: It is neither a function nor a sequence of functions.
        ValueError: There are too few.
    """
    wanted = f"functions without arguments that return a scalar, at least {at_least}"
    if not callable(loss) and not isinstance(loss, Sequence):
        raise TypeError(f"{name} is {loss!r}, expected {wanted}")
    functions = [loss] if callable(loss) else list(loss)
    for number, function in enumerate(functions):
        if not callable(function):
            raise TypeError(f"{name}[{number}] is {function!r}, expected {wanted}")
    if len(functions) < at_least:
        raise ValueError(f"{name} has {len(functions)} functions, expected {wanted}")
    return functions


def trainable(model: nn.Module, *, takes_sharded: bool = False) -> dict[str, nn.Parameter]:
    """Return the parameters that require a gradient, by name.

    Raises:
        TypeError: ``model`` is no module, a parameter is complex, or one is a DTensor or a part of
            FSDP1 and ``takes_sharded`` is False.
        ValueError: There are none.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {type(model).__name__}, expected a torch.nn.Module")
    found = {name: param for name, param in model.named_parameters() if param.requires_grad}
    if not found:
        raise ValueError("model has no parameter that requires a gradient, expected one at least")
    check_distributed([{"params": list(found.values()), "param_names": list(found)}])
    for name, param in found.items():
        if is_dtensor(param) and not takes_sharded:
            raise TypeError(
                f"model has a DTensor: {name!r}; expected plain tensors, of a model that is whole "
                "on every rank (only sharpness() takes sharded parameters)"
            )
        if param.is_complex():
            raise TypeError(f"model has a complex parameter: {name!r}; expected real ones")
    return found


def evaluate(function: Loss) -> Tensor:
    """Return what one loss function returns, of shape [] or [1].

    Raises:
        TypeError: That is no tensor of real floating-point numbers.
        ValueError: It has more or fewer elements than one.
    """
    forget_casts()
    value: Any = function()
    if not isinstance(value, Tensor) or not value.is_floating_point():
        found = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"loss returned {found}, expected a scalar tensor of real numbers")
    if value.numel() != 1:
        raise ValueError(f"loss returned shape {tuple(value.shape)}, expected a scalar, the mean")
    return value


def number_of(value: Tensor) -> float:
    """Return a loss as a number."""
    value = value.detach()
    if is_dtensor(value):
        value = value.full_tensor()  # type: ignore[attr-defined]
    return float(value)


def require_finite(loss: float, where: str) -> None:
    """Raise ValueError unless a loss is finite."""
    if not math.isfinite(loss):
        raise ValueError(f"loss is {loss} {where}, expected a finite number")


@torch.no_grad()
def mean_loss(functions: Sequence[Loss], start: SameStart) -> float:
    """Return the mean of the functions, in float64; it may be infinite or NaN."""
    with start.evaluation():
        return sum(number_of(evaluate(function)) for function in functions) / len(functions)


def gradients(
    value: Tensor, params: Sequence[Tensor], *, create_graph: bool = False
) -> list[Tensor | None]:
    """Return the gradient of a loss, None for parameters that it does not depend on.

    No hook of ``backward`` runs: a parameter may have one that updates it.

    Raises:
        ValueError: The loss does not depend on any.
    """
    require_graph(value)
    grads: list[Tensor | None] = list(
        torch.autograd.grad(value, params, create_graph=create_graph, allow_unused=True)
    )
    if all(grad is None for grad in grads):
        raise ValueError(
            "loss does not depend on any parameter of model that requires a gradient, expected the "
            "loss of this model"
        )
    return grads


def require_graph(value: Tensor) -> None:
    """Raise ValueError unless a loss has been computed with a graph."""
    if not value.requires_grad:
        raise ValueError(
            "loss returned a tensor without a graph, expected one that is computed from the "
            "parameters with gradients enabled, neither detached nor in torch.no_grad()"
        )


def require_finite_gradient(grads: Sequence[Tensor | None], loss: float) -> None:
    """Raise ValueError unless the loss and all of its gradient are finite."""
    require_finite(loss, "at the weights as they are")
    if not all(bool(torch.isfinite(grad).all()) for grad in grads if grad is not None):
        raise ValueError(f"the gradient of the loss is not finite, where the loss is {loss}")
