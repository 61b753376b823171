"""The backends and the only place that chooses one.

A backend is a module with the operations ``reduce``, ``perturb`` and ``update`` (and ``bind`` and
``refresh``, which take over addresses), all with the signatures of :class:`Backend`.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from wsam_fused.backends import eager, native
from wsam_fused.base_rules import BaseRule
from wsam_fused.tensor_list import Settings, TensorList


class Backend(Protocol):
    """The operations of a backend; all write in place and return nothing.

    Attributes:
        DEVICE_TYPES: Where parameters may be; empty for anywhere.
        DTYPES: Dtypes that parameters may have; empty for any floating one.
    """

    DEVICE_TYPES: tuple[str, ...]
    DTYPES: tuple[torch.dtype, ...]

    def unavailable(self) -> str | None:
        """Why this backend cannot be used here, or None."""

    def bind(self, tensors: TensorList, evaluation: int, addresses: Tensor) -> None:
        """Take over the gradients of one evaluation, 0 for g1."""

    def refresh(self, tensors: TensorList) -> None:
        """Take over the parameters' storage again after it moved."""

    def reduce(self, tensors: TensorList, evaluation: int) -> None:
        """Add the sums of squares of one gradient list to the shared scalars."""

    def perturb(self, tensors: TensorList, settings: Settings, *, undo: bool = False) -> None:
        """Move the parameters to the ascent point, or with ``undo`` back to w."""

    def update(
        self,
        tensors: TensorList,
        settings: Settings,
        rule: BaseRule,
        evaluations: int,
        *,
        count_skipped: bool,
    ) -> None:
        """Restore w, step the base rule and subtract the decoupled term."""


class Choice(NamedTuple):
    """A backend's name and why it was chosen."""

    name: str
    reason: str


# In the order of preference: the first that is available and supports the parameters is taken.
BACKENDS: dict[str, Backend] = {"cpu": native, "eager": eager}
NAMES = ("auto", *BACKENDS)


def select(
    requested: str, device: torch.device, dtype: torch.dtype, *, walkable: bool = True
) -> Choice:
    """Choose the backend for parameters of one kind.

    Args:
        requested: ``"auto"`` or the name of a backend.
        device: Where the parameters are.
        dtype: Their dtype.
        walkable: Whether the parameters are non-empty blocks of memory that a kernel can walk;
            others are always stepped by ``eager``.

    Raises:
        RuntimeError: The backend asked for cannot be used on this machine.
        ValueError: It does not support the device or dtype, or there is no such backend.
    """
    if requested not in NAMES:
        raise ValueError(f"backend is {requested!r}, expected one of {', '.join(map(repr, NAMES))}")
    if requested != "auto":
        _require(requested, device, dtype)
        if walkable or requested == "eager":
            return Choice(requested, "asked for")
    if not walkable:
        return Choice("eager", "empty or not a dense block of memory")
    reasons: list[str] = []
    for name, backend in BACKENDS.items():
        reason = backend.unavailable() or _unsupported(backend, device, dtype)
        if reason is None:
            return Choice(name, "; ".join(reasons) or "the fastest for this device")
        reasons.append(f"{name}: {reason}")
    raise AssertionError("eager supports everything")


def _require(name: str, device: torch.device, dtype: torch.dtype) -> None:
    reason = BACKENDS[name].unavailable()
    if reason is not None:
        raise RuntimeError(f"backend {name!r} is not available: {reason}")
    reason = _unsupported(BACKENDS[name], device, dtype)
    if reason is not None:
        raise ValueError(f"backend {name!r} {reason}; use backend='auto' or 'eager'")


def _unsupported(backend: Backend, device: torch.device, dtype: torch.dtype) -> str | None:
    if backend.DEVICE_TYPES and device.type not in backend.DEVICE_TYPES:
        return f"supports parameters on {', '.join(backend.DEVICE_TYPES)}, not on {device.type}"
    if backend.DTYPES and dtype not in backend.DTYPES:
        names = ", ".join(str(d).removeprefix("torch.") for d in backend.DTYPES)
        return f"supports {names} parameters, not {str(dtype).removeprefix('torch.')}"
    return None
