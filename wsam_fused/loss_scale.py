"""Gradients that a ``torch.amp.GradScaler`` has multiplied by its loss scale.

The scale is a factor on the coefficients of a step, never a pass of its own. What the scaler has to
know, whether a gradient was not finite, follows from the norms that a step forms anyway and from
one more read of the last gradients. Nothing waits for the device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler, OptState

if TYPE_CHECKING:
    from wsam_fused.engine import StepEngine


def check_scaler(scaler: Any, optimizer: Any) -> GradScaler | None:
    """Return the scaler, or None if there is none or it does nothing.

    Raises:
        RuntimeError: The gradients are unscaled already, or a step was made without ``update()``.
        TypeError: It is no GradScaler.
    """
    if scaler is None:
        return None
    if not isinstance(scaler, GradScaler):
        raise TypeError(
            f"scaler is {type(scaler).__name__}, expected a torch.amp.GradScaler or None"
        )
    if not scaler.is_enabled():
        return None
    stage = _state(scaler, optimizer)["stage"]
    if stage is OptState.UNSCALED:
        raise RuntimeError(
            "scaler.unscale_() was called before the gradients at w were taken, which unscales "
            "only these; do not call it, and clip with max_grad_norm"
        )
    if stage is OptState.STEPPED:
        raise RuntimeError("a step was made since scaler.update() was called last; call it first")
    return scaler


def scale_of(scaler: GradScaler, device: torch.device) -> Tensor:
    """Return the loss scale, a float32 scalar on ``device``."""
    return scaler.scale(torch.ones((), device=device))


def tell(scaler: GradScaler, optimizer: Any, engine: StepEngine) -> None:
    """Let the scaler know that a step was made, and whether a gradient of it was not finite."""
    state = _state(scaler, optimizer)
    found = engine.found_inf()
    state["found_inf_per_device"] = {found.device: found}
    state["stage"] = OptState.STEPPED


def add_to_found(scaler: GradScaler, optimizer: Any, engine: StepEngine) -> None:
    """Let a scaler that has looked at the last gradients only know of the others."""
    found = engine.found_inf()
    for known in _state(scaler, optimizer)["found_inf_per_device"].values():
        known.add_(found.to(known.device, non_blocking=True))


def _state(scaler: GradScaler, optimizer: Any) -> dict[str, Any]:
    # There is no public way: the scaler looks at `.grad` only, and the first gradients have left it
    # by then.
    state: dict[str, Any] = scaler._per_optimizer_states[id(optimizer)]
    return state
