"""A step with gradients that are there already: others compute those at the perturbed weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from wsam_fused.optimizer import SharpnessAwareOptimizer

SecondEvaluation = Callable[[], Any]


def step_with_second_evaluation(
    optimizer: SharpnessAwareOptimizer, evaluate: SecondEvaluation
) -> None:
    """Perform one step from the gradients in ``.grad``.

    Args:
        optimizer: Has no step in progress.
        evaluate: See :attr:`SharpnessAwareOptimizer.second_evaluation`.

    Raises:
        RuntimeError: There are no gradients, or ``evaluate`` left none.
    """
    optimizer.first_step(zero_grad=True)
    calls = (optimizer.second_step, optimizer.third_step)[: optimizer.evaluations - 1]
    losses = []
    try:
        for call in calls:
            if not optimizer.is_perturbed:  # it was a step of the base optimizer
                return
            with torch.enable_grad():
                losses.append(evaluate())
            _require_gradients(optimizer)
            call(zero_grad=call is not calls[-1])
    except BaseException:
        optimizer.restore()
        raise
    optimizer.last.set_losses(None, losses[0])


def _require_gradients(optimizer: SharpnessAwareOptimizer) -> None:
    engine = optimizer._engine
    if engine is not None and engine.progress.arrived:
        return  # and have been used, within the backward
    for group in optimizer.param_groups:
        if any(param.grad is not None for param in group["params"]):
            return
    raise RuntimeError(
        "second_evaluation left no gradient in any parameter; it has to call backward() on the "
        "loss of the same data"
    )
