"""The rows of the test matrix: base optimizers, methods and tensor lists."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW

from wsam_fused import BSAM, GNP, GSAM, SAM, WSAM
from wsam_fused.backends import BACKENDS

Optimizer = torch.optim.Optimizer

BASES: dict[str, Callable[..., Optimizer]] = {
    "sgd": functools.partial(SGD, lr=0.05),
    "sgd-l2": functools.partial(SGD, lr=0.05, weight_decay=0.01),
    "sgdm": functools.partial(SGD, lr=0.05, momentum=0.9, weight_decay=0.01),
    "sgdm-dampened": functools.partial(SGD, lr=0.05, momentum=0.9, dampening=0.3),
    "nesterov": functools.partial(SGD, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
    "sgdm-maximize": functools.partial(SGD, lr=0.05, momentum=0.9, maximize=True),
    "adam": functools.partial(Adam, lr=0.01, weight_decay=0.1),
    "adam-eps": functools.partial(Adam, lr=0.01, betas=(0.8, 0.95), eps=1e-3),
    "amsgrad": functools.partial(Adam, lr=0.01, amsgrad=True),
    "adamw": functools.partial(AdamW, lr=0.01, weight_decay=0.1),
    "adamw-amsgrad": functools.partial(AdamW, lr=0.01, amsgrad=True, weight_decay=0.1),
    "adamw-maximize": functools.partial(AdamW, lr=0.01, maximize=True),
}

# Stepped as they are, between our perturb and restore.
FOREIGN_BASES: dict[str, Callable[..., Optimizer]] = {
    "rmsprop": functools.partial(torch.optim.RMSprop, lr=0.01),
    "rmsprop-maximize": functools.partial(torch.optim.RMSprop, lr=0.01, maximize=True),
    "adadelta": functools.partial(torch.optim.Adadelta, lr=0.5, rho=0.8),
    "adagrad": functools.partial(torch.optim.Adagrad, lr=0.01),  # makes its state when built
}

# Those that are stepped with given gradients; see test_per_sample.py for the others.
METHODS: dict[str, Callable[..., Any]] = {
    "sam": SAM,
    "wsam": functools.partial(WSAM, gamma=0.9),
    "wsam-gamma-0": functools.partial(WSAM, gamma=0.0),
    "coupled": functools.partial(WSAM, gamma=0.8, decouple=False),
    "coupled-half": functools.partial(WSAM, gamma=0.5, decouple=False),
    "gsam": functools.partial(GSAM, alpha=0.4),
    "bsam": functools.partial(BSAM, rho_min=0.2),
    "bsam-as-published": functools.partial(BSAM, rho_min=0.2, as_published=True),
    "gnp": functools.partial(GNP, alpha=0.8),
}

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"rho": 0.1},
    "adaptive": {"rho": 0.5, "adaptive": True},
    "asam": {"rho": 0.5, "geometry": "adaptive", "eta": 0.05},
    "fisher": {"rho": 0.1, "geometry": "fisher", "eta": 0.7},
    "backup": {"rho": 0.1, "restore": "backup"},
    "clip": {"rho": 0.1, "max_grad_norm": 0.5},
    "clip-adaptive": {"rho": 0.5, "adaptive": True, "max_grad_norm": 0.5},
    "check-finite": {"rho": 0.1, "check_finite": True},
}


# How 16-bit parameters are kept.
KEEPING: dict[str, dict[str, Any]] = {
    "master": {"master_weights": True},
    "narrow": {"state_dtype": "parameter"},
    "master-narrow": {"master_weights": True, "state_dtype": "parameter"},
    "chance": {"stochastic_rounding": True},
    "chance-narrow": {"stochastic_rounding": True, "state_dtype": "parameter"},
}


def keepings_of(dtype: torch.dtype) -> list[str]:
    """Return the names of those that there are for parameters of 16 bits."""
    return [name for name in KEEPING if dtype == torch.bfloat16 or "chance" not in name]


def _contiguous(*shapes: tuple[int, ...]) -> Callable[[torch.dtype], list[Tensor]]:
    return lambda dtype: [torch.randn(shape, dtype=dtype) for shape in shapes]


def _strided(dtype: torch.dtype) -> list[Tensor]:
    return [
        torch.randn(8, 6, dtype=dtype).t(),
        torch.randn(4, 3, 5, 5, dtype=dtype).to(memory_format=torch.channels_last),
        torch.randn(10, 20, dtype=dtype)[:, ::2],  # not a dense block: stepped by the reference
        torch.randn(7, dtype=dtype),
    ]


def _unaligned(dtype: torch.dtype) -> list[Tensor]:
    block = torch.randn(4000, dtype=dtype)
    return [block[1:18], block[19:1042], block[1043:1044], block[1047:3999]]


def _awkward(dtype: torch.dtype) -> list[Tensor]:
    """Few tensors, of which each is a difficulty, and all can be walked by a kernel."""
    sizes = [
        torch.randn(shape, dtype=dtype) for shape in ((), (5,), (17, 3), (65,), (5 * 1024 + 3,))
    ]
    transposed = torch.randn(4, 3, 5, 5, dtype=dtype).to(memory_format=torch.channels_last)
    return [*sizes, *_unaligned(dtype), transposed]


# What a kernel has to get right about a list of tensors.
LAYOUTS: dict[str, Callable[[torch.dtype], list[Tensor]]] = {
    "sizes": _contiguous((), (1,), (0,), (3, 0), (5,), (17, 3), (64,), (65,), (128, 129)),
    "many-chunks": _contiguous((40_001,), (3,), (16_384,), (16_385,)),
    "strided": _strided,
    "unaligned": _unaligned,
    "awkward": _awkward,
    "tiny": lambda dtype: [torch.randn(1 + i % 5, dtype=dtype) for i in range(2000)],
}


def device_of(backend: str) -> torch.device:
    """Return where a backend can step parameters."""
    return torch.device((BACKENDS[backend].DEVICE_TYPES or ("cpu",))[0])


def parameters(
    layout: str, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> list[torch.nn.Parameter]:
    """Parameters of a layout, with the same values for the same seed on every device."""
    tensors = LAYOUTS[layout](dtype)
    if torch.device(device).type != "cpu":
        tensors = [moved(tensor, device) for tensor in tensors]
    return [torch.nn.Parameter(tensor) for tensor in tensors]


def moved(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Copy a tensor to a device, with its strides and its offset in the storage."""
    size = tensor.untyped_storage().nbytes() // tensor.element_size()
    storage = tensor.as_strided((size,), (1,), 0).to(device)
    return storage.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def set_gradients(
    params: list[torch.nn.Parameter], seed: int, dtype: torch.dtype | None = None
) -> None:
    """Give every parameter a gradient that depends on the seed only.

    Args:
        params: The parameters.
        seed: Of the values.
        dtype: Of the gradients, that of the parameters by default.
    """
    generator = torch.Generator().manual_seed(seed)
    for param in params:
        values = torch.randn(param.shape, generator=generator, dtype=torch.float64)
        if dtype is not None:
            param.grad_dtype = dtype
        param.grad = values.to(param.device, dtype or param.dtype)


def step(
    optimizer: Any,
    params: list[torch.nn.Parameter],
    seed: int,
    dtypes: tuple[torch.dtype | None, torch.dtype | None] = (None, None),
) -> None:
    """One step with given gradients, call by call; ``dtypes`` are those of g1 and of the others."""
    for evaluation in range(optimizer.evaluations):
        set_gradients(params, seed_of(seed, evaluation), dtypes[min(evaluation, 1)])
        call(optimizer, evaluation)


def seed_of(step: int, evaluation: int) -> int:
    """Return the seed of the gradients of an evaluation."""
    return 2 * step + evaluation if evaluation < 2 else 1000 + step


def call(optimizer: Any, evaluation: int) -> None:
    """Give an optimizer the gradients of an evaluation, 0 for g1."""
    calls = (optimizer.first_step, optimizer.second_step, getattr(optimizer, "third_step", None))
    calls[evaluation](zero_grad=True)
