"""Gradients that a ``torch.amp.GradScaler`` has multiplied by its loss scale.

The scale is a factor on the coefficients of a step, never a pass of its own. What the scaler has to
know, whether a gradient was not finite, follows from the norms that a step forms anyway and from
one more read of the last gradients. Nothing waits for the device.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler, OptState

from wsam_fused.callers import stacklevel_of_caller
from wsam_fused.in_backward import refuse_while_active

if TYPE_CHECKING:
    from wsam_fused.engine import StepEngine


class ScaledSteps:
    """What a step does with a GradScaler; a part of :class:`SharpnessAwareOptimizer`.

    Attributes:
        second_evaluation_scaler: Steps this optimizer, and ``second_evaluation`` scales the loss
            with it; needed where ``scaler.step(optimizer)`` makes whole steps.
    """

    # A GradScaler then calls step() whatever it has found, and says so in `found_inf`.
    _step_supports_amp_scaling = True
    # It sets these, for as long as it calls step(); the scale is None if it has unscaled.
    grad_scale: Tensor | None
    found_inf: Tensor | None

    second_evaluation_scaler: GradScaler | None = None
    _scaler: GradScaler | None = None  # of the step in progress
    # Whether the scaler has called step() with the first gradients, and not with the last.
    _scaler_has_first = False
    _warned_of_float16 = False

    @contextmanager
    def _called_by_scaler(self) -> Iterator[None]:
        """Take what a scaler has set; it takes that back itself, but not after an exception."""
        try:
            yield
        except BaseException:
            vars(self).pop("grad_scale", None)
            vars(self).pop("found_inf", None)
            raise

    def _found_by_scaler(self) -> Tensor | None:
        return getattr(self, "found_inf", None)

    def _take_scaler(self, scaler: Any) -> None:
        """Begin a step with a scaler, or with None."""
        self._scaler_has_first = scaler is None and self._found_by_scaler() is not None
        if self._scaler_has_first:
            self._scaler = self.second_evaluation_scaler
            if self._scaler is None:
                raise RuntimeError(
                    "GradScaler.step() makes a step whose later gradients it does not know of; set "
                    "second_evaluation_scaler to the scaler"
                )
        else:
            self._scaler = check_scaler(scaler, self)
        if self._scaler is not None:
            what, reason = "a step was given a scaler", "its scale is taken out after the backward"
            refuse_while_active(self, what, reason)

    def _set_loss_scale(self, engine: StepEngine) -> None:
        """Take the scale into the step, whose first gradients have been read."""
        if self._scaler is None:
            engine.scale.set(None)
            self._warn_of_float16(engine)
            return
        engine.scale.set(scale_of(self._scaler, engine.scalars.device))
        if self._scaler_has_first and self.grad_scale is None:
            engine.scale.forget(0)

    def _refuse_closure_of_scaler(self) -> None:
        if self._found_by_scaler() is not None:
            raise RuntimeError(
                "GradScaler.step() was given a closure, which it cannot scale; call "
                "optimizer.step(closure, scaler=scaler) and then scaler.update()"
            )

    def _note_scaled(self, engine: StepEngine) -> None:
        """Take over what the scaler knows of the last gradients, or look at them ourselves."""
        found = self._found_by_scaler()
        if found is None or self._scaler_has_first:
            engine.progress.checks_all = self._scaler is not None
        if found is None:
            return
        if self._scaler is None:
            raise RuntimeError(
                "GradScaler.step() completes a step whose first gradients it does not know of; "
                "call first_step(zero_grad=True, scaler=scaler)"
            )
        if self.grad_scale is None and not self._scaler_has_first:
            engine.scale.forget(engine.read - 1)  # by scaler.unscale_()
        engine.scale.set_found_inf(found)

    def _tell_scaler(self, engine: StepEngine) -> None:
        """Let the scaler know that a step was made, and of gradients that are not finite."""
        if self._scaler is None:
            return
        if self._found_by_scaler() is None:
            tell(self._scaler, self, engine)
        else:
            add_to_found(self._scaler, self, engine)

    def _warn_of_float16(self, engine: StepEngine) -> None:
        """Say once that small gradients are lost."""
        if self._warned_of_float16:
            return
        lists = engine.lists.lists
        if any(torch.float16 in (tensors.key.dtype, tensors.grad_dtype) for tensors in lists):
            self._warned_of_float16 = True
            warnings.warn(
                "gradients are float16, in which small ones vanish, and no GradScaler was given; "
                "call scaler.scale(loss).backward() and step(closure, scaler=scaler), or use "
                "bfloat16",
                stacklevel=stacklevel_of_caller(),
            )


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
    found = found_inf(engine)
    state["found_inf_per_device"] = {found.device: found}
    state["stage"] = OptState.STEPPED


def add_to_found(scaler: GradScaler, optimizer: Any, engine: StepEngine) -> None:
    """Let a scaler that has looked at the last gradients only know of the others."""
    found = found_inf(engine)
    for known in _state(scaler, optimizer)["found_inf_per_device"].values():
        known.add_(found.to(known.device, non_blocking=True))


def found_inf(engine: StepEngine) -> Tensor:
    """Return 1 if a gradient of a step was not finite, else 0: a float32 scalar on the device."""
    return (~engine.all_known_are_finite()).to(torch.float32)


def _state(scaler: GradScaler, optimizer: Any) -> dict[str, Any]:
    # There is no public way: the scaler looks at `.grad` only, and the first gradients have left it
    # by then.
    state: dict[str, Any] = scaler._per_optimizer_states[id(optimizer)]
    return state
