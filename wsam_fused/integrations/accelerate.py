"""Hugging Face Accelerate: gradient accumulation in loops of one's own.

``optimizer.step(closure)`` works on a prepared optimizer as it is, without accumulation and without
loss scaling (``mixed_precision="fp16"``).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from torch import Tensor

from wsam_fused.integrations.prepared import sharpness_aware
from wsam_fused.integrations.window import Window

try:
    from accelerate import Accelerator
except ImportError as error:
    raise ImportError(
        "wsam_fused.integrations.accelerate needs Accelerate: pip install accelerate"
    ) from error


class SharpnessAwareAccumulation:
    """Remembers the micro-batches of a step, and evaluates them again at the perturbed weights.

    One perturbation belongs to all of them, so that a step is that with one large batch. To clip,
    give the optimizer ``max_grad_norm``, which clips each of its gradients;
    ``accelerator.clip_grad_norm_`` before ``step()`` clips the first one only.

    Args:
        accelerator: With which the others were prepared.
        optimizer: One of this package, as ``accelerator.prepare`` returned it.
        models: The models whose gradients ``accelerator.accumulate`` keeps back.

    Raises:
        TypeError: The optimizer is of another kind.

    Example:
        >>> accumulation = SharpnessAwareAccumulation(accelerator, optimizer, model)
        >>> for x, y in loader:
        ...     with accelerator.accumulate(model):
        ...         loss = accumulation.backward(loss_of, x, y)
        ...         optimizer.step()
        ...         optimizer.zero_grad()
    """

    def __init__(self, accelerator: Accelerator, optimizer: Any, *models: Any) -> None:
        self._optimizer = sharpness_aware(optimizer, "optimizer")
        self._optimizer.second_evaluation_scaler = accelerator.scaler
        self._accelerator = accelerator
        self._models = models
        self._window = Window(self._backward, self._without_sync)

    def backward(self, loss_fn: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Compute the loss of a micro-batch, call ``accelerator.backward``, and remember it.

        Args:
            loss_fn: Returns the loss, a scalar with its graph. It is called again at the perturbed
                weights, before the weights are updated.
            args: Its arguments.
            kwargs: Its arguments.

        Returns:
            The loss, detached.
        """
        loss = self._backward(loss_fn, args, kwargs)
        last = self._accelerator.sync_gradients
        self._window.add(loss_fn, args, kwargs, is_last=last)
        if last:
            self._optimizer.second_evaluation = self._evaluate_again
        return loss

    def _evaluate_again(self) -> Tensor:
        losses = self._window.evaluate()
        total: Tensor = sum(losses[1:], losses[0])
        return total / len(losses)

    def _backward(
        self, loss_fn: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        loss = loss_fn(*args, **kwargs)
        self._accelerator.backward(loss)
        return loss.detach()

    def _without_sync(self) -> ExitStack:
        stack = ExitStack()
        for model in self._models:
            stack.enter_context(self._accelerator.no_sync(model))
        return stack
