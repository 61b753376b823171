"""The methods that the demonstration can show, by name, and how each is given its gradients."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks import training_step
from benchmarks.training_step import Takes
from wsam_fused import BSAM, ESAM, GNP, GSAM, RWSAM, SAM, WSAM

RHO = 0.05
GAMMA = 0.8
_MICROBATCHES = 4

_BASES: dict[str, tuple[type[Optimizer], dict[str, Any]]] = {
    "SGDM": (torch.optim.SGD, {"lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4}),
    "AdamW": (torch.optim.AdamW, {"lr": 2e-3, "weight_decay": 0.01}),
}


@dataclass(frozen=True)
class Method:
    """One method of the demonstration.

    Attributes:
        make: Its class, with what it has of its own.
        own: The hyper-parameters in words.
        takes: What its ``step`` is given: ``"closure"``, ``"closures"`` or ``"losses"``.
    """

    make: Callable[..., Any]
    own: str
    takes: Takes = "closure"


def _method(make: Callable[..., Any], takes: Takes = "closure", **own: Any) -> Method:
    own = {"rho": RHO, **own}
    words = ", ".join(f"{key} {value}" for key, value in own.items())
    return Method(functools.partial(make, **own), words, takes)


METHODS: dict[str, Method] = {
    "SAM": _method(SAM),
    "ASAM": _method(SAM, rho=0.5, geometry="adaptive"),
    "Fisher-SAM": _method(SAM, geometry="fisher"),
    "WSAM": _method(WSAM, gamma=GAMMA),
    "Coupled-WSAM": _method(WSAM, gamma=GAMMA, decouple=False),
    "GSAM": _method(GSAM, alpha=0.4),
    "BSAM": _method(BSAM, rho_min=RHO),
    "ESAM": _method(ESAM, "losses", beta=0.5, gamma=0.5),
    "RWSAM": _method(RWSAM, "losses", lam=0.5, delta=1e-3),
    "GNP": _method(GNP, rho=0.1, alpha=0.8),
    "m-SAM": _method(SAM, "closures"),
}


def described(methods: list[str]) -> str:
    """Return the hyper-parameters of some methods in words, one line each."""
    base = ", ".join(f"{name} {value:g}" for name, value in _BASES["SGDM"][1].items())
    lines = [f"SGDM: {base.replace('_', ' ')}; lr falls as a cosine; the base of the others"]
    for name in methods:
        if name in METHODS:
            form = f", {_MICROBATCHES} micro-batches" if METHODS[name].takes == "closures" else ""
            lines.append(f"{name}: {METHODS[name].own}{form}")
    return "\n".join(lines)


def build_optimizer(method: str, base: str, net: nn.Module, backend: str) -> Optimizer:
    """Return the optimizer for a net.

    Args:
        method: A key of ``METHODS``, or the name of the base for the base itself.
        base: SGDM or AdamW.
        net: Its BatchNorm statistics are kept out of the perturbed evaluations.
        backend: Backend of the methods that are ours.
    """
    base_class, arguments = _BASES[base]
    if method not in METHODS:
        return base_class(net.parameters(), **arguments)
    optimizer: Optimizer = METHODS[method].make(
        net.named_parameters(), base_class, backend=backend, model=net, **arguments
    )
    return optimizer


def train_step(
    method: str, net: nn.Module, optimizer: Optimizer, x: Tensor, y: Tensor
) -> tuple[float, float]:
    """Make one step with a method.

    Returns:
        Seconds of all of it, and of the part inside the optimizer.
    """
    takes = METHODS[method].takes if method in METHODS else "closure"
    return training_step.train_step(takes, net, optimizer, x, y, parts=_MICROBATCHES)
