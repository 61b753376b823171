"""The backends and the only place that chooses one.

A backend is a module with the operations ``reduce``, ``perturb`` and ``updating`` (and ``bind`` and
``refresh``, which take over addresses), all with the signatures of :class:`Backend`.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from wsam_fused.backends import eager, native, triton
from wsam_fused.base_rules import BaseRule
from wsam_fused.plan import Point
from wsam_fused.tensor_list import TensorList
from wsam_fused.uninterrupted import Change


class Backend(Protocol):
    """The operations of a backend; all write in place, an update when what it returns is called.

    Attributes:
        DEVICE_TYPES: Where parameters may be; empty for anywhere.
        DTYPES: Dtypes that parameters may have; empty for any floating one.
        GRADIENT_DTYPES: Dtypes that gradients of such parameters may have besides.
    """

    DEVICE_TYPES: tuple[str, ...]
    DTYPES: tuple[torch.dtype, ...]
    GRADIENT_DTYPES: dict[torch.dtype, tuple[torch.dtype, ...]]

    def unavailable(self) -> str | None:
        """Why this backend cannot be used here, or None."""

    def device_problem(self, device: torch.device) -> str | None:
        """Why it cannot be used on one device of a supported type, or None."""

    def bind(self, tensors: TensorList, evaluation: int, addresses: Tensor) -> None:
        """Take over the gradients of one evaluation, 0 for g1."""

    def refresh(self, tensors: TensorList) -> None:
        """Take over the parameters' storage again after it moved."""

    def reduce(
        self, tensors: TensorList, evaluation: int, *, with_first: bool, accumulate: bool
    ) -> None:
        """Write the sums over one gradient list to the shared scalars, or add them.

        Args:
            tensors: The parameters.
            evaluation: Which gradients, 0 for g1.
            with_first: Also form their dot product with g1.
            accumulate: Add to what other lists of the device gave.
        """

    def perturb(self, tensors: TensorList, target: Point) -> None:
        """Move the parameters from where they are to another point."""

    def updating(
        self,
        tensors: TensorList,
        rule: BaseRule,
        evaluations: int,
        *,
        required: int,
        checked: int,
        keep_point: bool,
        count_skipped: bool,
    ) -> Change:
        """Return what restores w, steps the base rule and subtracts the decoupled term.

        All that can fail is done here, so that several lists are updated or none. Nothing may
        change in between.

        Args:
            tensors: The parameters.
            rule: The base rule.
            evaluations: How many gradients there are.
            required: Bit k: a parameter that has no gradient k + 1 is not updated.
            checked: Bit k: the norm of gradient k + 1 is known; skip the step if it is not finite.
            keep_point: Start from where the parameters are and not from w.
            count_skipped: Add a skipped step to the counter.
        """


class Choice(NamedTuple):
    """A backend's name and why it was chosen."""

    name: str
    reason: str


# In the order of preference: the first that is available and supports the parameters is taken.
BACKENDS: dict[str, Backend] = {
    "cpu": native.CPU,
    "cuda": native.CUDA,
    "triton": triton.TRITON,
    "eager": eager,
}


def names() -> tuple[str, ...]:
    """Return what ``backend`` may be."""
    return ("auto", *BACKENDS)


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
    if requested not in names():
        known = ", ".join(map(repr, names()))
        raise ValueError(f"backend is {requested!r}, expected one of {known}")
    if requested != "auto":
        _require(requested, device, dtype)
        if walkable or requested == "eager":
            return Choice(requested, "asked for")
    if not walkable:
        return Choice("eager", "empty or not a dense block of memory")
    reasons: list[str] = []
    for name, backend in BACKENDS.items():
        if _wrong_device(backend, device):
            continue  # goes without saying
        reason = _wrong_dtype(backend, dtype) or backend.unavailable()
        reason = reason or backend.device_problem(device)
        if reason is None:
            best = "the fastest" if BACKENDS[name] is not eager else f"the only one for {device}"
            return Choice(name, "; ".join(reasons) or best)
        reasons.append(f"{name}: {reason}")
    raise AssertionError("eager supports everything")


def _require(name: str, device: torch.device, dtype: torch.dtype) -> None:
    backend = BACKENDS[name]
    reason = backend.unavailable()
    if reason is not None:
        raise RuntimeError(f"backend {name!r} is not available: {reason}")
    reason = _wrong_device(backend, device) or _wrong_dtype(backend, dtype)
    if reason is not None:
        raise ValueError(f"backend {name!r} {reason}; use backend='auto' or 'eager'")
    reason = backend.device_problem(device)
    if reason is not None:
        raise RuntimeError(f"backend {name!r} cannot be used on {device}: {reason}")


def _wrong_device(backend: Backend, device: torch.device) -> str | None:
    if not backend.DEVICE_TYPES or device.type in backend.DEVICE_TYPES:
        return None
    return f"supports parameters on {', '.join(backend.DEVICE_TYPES)}, not on {device.type}"


def _wrong_dtype(backend: Backend, dtype: torch.dtype) -> str | None:
    if not backend.DTYPES or dtype in backend.DTYPES:
        return None
    supported = ", ".join(str(d).removeprefix("torch.") for d in backend.DTYPES)
    return f"supports {supported} parameters, not {str(dtype).removeprefix('torch.')}"
