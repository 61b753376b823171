"""Directions in the space of the parameters, along which the loss is looked at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from wsam_fused.arguments import whole_number
from wsam_fused.landscape.evaluation import trainable

# One tensor for each parameter that requires a gradient, in the order of model.parameters().
Direction = Sequence[Tensor]


@torch.no_grad()
def random_direction(model: nn.Module, seed: int = 0) -> list[Tensor]:
    """Return a Gaussian direction of which each filter has the norm of the model's filter.

    A filter is what belongs to one index of the first dimension of a parameter: the weights of one
    output. Parameters of fewer than two dimensions (biases, normalization) do not move. Slices of
    networks whose weights have another scale, but compute the same, are then alike.

    Args:
        model: A module.
        seed: Of a generator of its own, >= 0. The numbers are the same on every device.

    Returns:
        A tensor of the shape, dtype and device of every parameter that requires a gradient, in the
        order of ``model.parameters()``.

    Raises:
        TypeError: ``model`` is no module, or has DTensors.
        ValueError: ``seed`` is negative, or no parameter has two dimensions.

    Reference:
        Li, Xu, Taylor, Studer, Goldstein: Visualizing the Loss Landscape of Neural Nets. NeurIPS
        2018. arXiv:1712.09913, section 4.
    """
    params = trainable(model)
    generator = torch.Generator("cpu").manual_seed(whole_number("seed", seed, 0))
    if all(param.dim() < 2 for param in params.values()):
        raise ValueError(
            "model has no parameter of two or more dimensions that requires a gradient, so that "
            "no filter has a direction; expected one, or a direction of your own"
        )
    return [_like_filters(param, generator) for param in params.values()]


def _like_filters(param: Tensor, generator: torch.Generator) -> Tensor:
    if param.dim() < 2 or param.numel() == 0:
        return torch.zeros_like(param)
    noise = torch.randn(param.shape, generator=generator, dtype=torch.float64, device="cpu")
    unit = noise / _filter_norms(noise)
    return unit.to(param.device).mul(_filter_norms(param.detach().double())).to(param.dtype)


def _filter_norms(tensor: Tensor) -> Tensor:
    others = list(range(1, tensor.dim()))
    norms: Tensor = torch.linalg.vector_norm(tensor, dim=others, keepdim=True)
    return norms


@torch.no_grad()
def direction_to(model: nn.Module, other: nn.Module | Mapping[str, Tensor]) -> list[Tensor]:
    """Return the way from the weights of one model to those of another.

    A slice along it has the loss of ``model`` at 0 and, with the other's buffers being the same,
    that of ``other`` at 1. Buffers stay those of ``model``: where running statistics of BatchNorm
    differ, look at the slice in training mode, or compute them anew.

    Args:
        model: A module.
        other: A module with parameters of the same names and shapes, or its ``state_dict()``.
            Only those count that require a gradient in ``model``.

    Returns:
        As :func:`random_direction`.

    Raises:
        TypeError: ``model`` is no module or has DTensors, or ``other`` is no module and no mapping.
        ValueError: A parameter is missing in ``other`` or has another shape there.
    """
    params = trainable(model)
    if isinstance(other, nn.Module):
        # Tied parameters may have other names there.
        values: Mapping[str, Tensor] = dict(other.named_parameters(remove_duplicate=False))
    elif isinstance(other, Mapping):
        values = other
    else:
        raise TypeError(f"other is {type(other).__name__}, expected a module or a state_dict")
    direction = []
    for name, param in params.items():
        value = values.get(name)
        if not isinstance(value, Tensor) or value.shape != param.shape:
            found = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
            raise ValueError(f"other has {found} for {name!r}, expected shape {tuple(param.shape)}")
        direction.append(value.detach().to(param.device, param.dtype) - param.detach())
    return direction


def as_direction(name: str, direction: Direction, params: Sequence[Tensor]) -> list[Tensor]:
    """Return a direction with the dtypes and devices of the parameters.

    Raises:
        TypeError: It is no sequence of tensors.
        ValueError: Their number or shapes are others than the parameters', or one is not finite.
    """
    wanted = f"a sequence of {len(params)} tensors, one for each parameter with a gradient"
    if not isinstance(direction, Sequence) or not all(isinstance(d, Tensor) for d in direction):
        raise TypeError(f"{name} is {type(direction).__name__}, expected {wanted}")
    if len(direction) != len(params):
        raise ValueError(f"{name} has {len(direction)} tensors, expected {wanted}")
    for number, (part, param) in enumerate(zip(direction, params, strict=True)):
        if part.shape != param.shape:
            raise ValueError(
                f"{name}[{number}] has shape {tuple(part.shape)}, expected {tuple(param.shape)}"
            )
        if not bool(torch.isfinite(part).all()):
            raise ValueError(f"{name}[{number}] has elements that are not finite")
    return [
        part.detach().to(param.device, param.dtype)
        for part, param in zip(direction, params, strict=True)
    ]
