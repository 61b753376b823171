"""Updates with means in place of gradients: of micro-batches, of ranks, or of both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from wsam_fused.backends import BACKENDS
from wsam_fused.base_rules import BaseRule
from wsam_fused.coefficients import with_the_perturbation_of
from wsam_fused.distributed import like
from wsam_fused.engine import StepEngine
from wsam_fused.foreign import gradients_for_step
from wsam_fused.gradients import check_not_overwritten, walkable
from wsam_fused.plan import GroupRow, Slot, addresses_of
from wsam_fused.row import BASE_ROW, Row
from wsam_fused.tensor_list import TensorList
from wsam_fused.widening import widen_gradients

if TYPE_CHECKING:
    from wsam_fused.optimizer import SharpnessAwareOptimizer

OVERWRITTEN = (
    "the gradient of a parameter of shape {shape} was written over one that is still in use, that "
    "at w or the sum over earlier micro-batches; closures must not leave their gradients in memory "
    "that they use again"
)


@torch.no_grad()
def update_with_means(
    optimizer: SharpnessAwareOptimizer,
    method: list[Row],
    required: int,
    *totals: dict[Tensor, Tensor],
    poison: Tensor | None = None,
    is_gradient: bool = True,
    is_scaled: bool = True,
) -> None:
    """Update with means in place of gradients; one that is not finite skips the step.

    Args:
        optimizer: Whose step it is; the weights are not perturbed.
        method: The rows to apply to them.
        required: Bit k: what has no mean k + 1 is not updated.
        totals: The means of a rank, which are let go.
        poison: A scalar; NaN also skips the step, else it is 0.
        is_gradient: Whether the first is a mean of gradients at w, whose norm may be told.
        is_scaled: Whether they are still multiplied by the loss scale, if there is one.
    """
    params = [param for group in optimizer.param_groups for param in group["params"]]
    totals = tuple(optimizer._replicas.average(params, totals))
    for evaluation, total in enumerate(totals):
        grads = [like(param, total.pop(param, None)) for param in params]
        with gradients_for_step(params, grads):
            if evaluation == 0:
                engine = optimizer._begin(take=True)
                if not is_scaled:
                    engine.scale.set(None)
            else:
                engine.read_next(take=True)
        engine.reduce(evaluation)
    for tensors in engine.lists.lists:
        tensors.reader.forget_who_shares()  # sums are nobody else's; gradients may be
    if poison is not None:
        for shared in engine.lists.shared.values():
            shared.scalars[Slot.GRAD1_SQ] += poison.to(shared.scalars.device)
    optimizer._update(method, required=required)
    if not is_gradient:
        engine.forget_norms()
    optimizer.zero_grad()


def update_with_h(
    optimizer: SharpnessAwareOptimizer,
    total: dict[Tensor, Tensor],
    poison: Tensor,
    *,
    is_scaled: bool,
) -> None:
    """Update with the mean of what the base optimizer is fed; see :func:`update_with_means`."""
    base = [BASE_ROW] * len(optimizer.param_groups)
    update_with_means(
        optimizer, base, 0b1, total, poison=poison, is_gradient=False, is_scaled=is_scaled
    )


def poison_of(engine: StepEngine, before: Tensor | None = None) -> Tensor:
    """Return NaN if a norm is not finite or ``before`` is NaN, else 0; a float64 scalar."""
    nothing = engine.scalars[Slot.METRIC_SQ : Slot.GRAD1_SQ + 1].sum() * 0.0
    return nothing if before is None else before + nothing


def combine(
    engine: StepEngine,
    rows: list[GroupRow],
    method: Sequence[Row],
    share: float,
    total: Mapping[Tensor, Tensor],
) -> dict[Tensor, Tensor]:
    """Restore w, and return share * h + total in the memory of g1; nothing is updated.

    Args:
        engine: Has read all gradients of the method; no more than two, if there is a total.
        rows: One per group. Nothing is clipped.
        method: The method's rows, one per group; d has to be 0.
        share: Weight of h.
        total: What h is added to; a parameter without all gradients keeps its own.
    """
    rows = with_the_perturbation_of(engine.lists.primary.rows, rows)
    # The update multiplies by the sign, and so will that with the sum: once is enough. For a
    # foreign optimizer it has been taken out of h before.
    shares = [share if engine.foreign is not None else share * row.sign for row in rows]
    scaled = [
        row._replace(
            h1=each * row.h1,
            h2=each * row.h2,
            h3=row.sign if total else each * row.h3,
            max_norm=-1.0,
        )
        for row, each in zip(rows, shares, strict=True)
    ]
    engine.lists.set_rows(scaled)
    engine.derive(scaled, method, shares)
    if total:
        engine.scale.forget(2)  # the sums have none
    required = (1 << engine.read) - 1
    result = dict(total)
    for tensors, backend in engine.lists:
        if total:
            _bind_sums(engine, tensors, total)
        backend.updating(
            tensors,
            BaseRule.NONE,
            3 if total else engine.read,
            required=required,
            checked=0,  # what is not finite makes the sum so
            keep_point=False,
            count_skipped=False,
        )()
        for i, (param, h) in enumerate(zip(tensors.owners, tensors.grads[0], strict=True)):
            if h is not None and tensors.has_gradients(i, required):
                result[param] = h
    engine.finish()
    return result


def _bind_sums(engine: StepEngine, tensors: TensorList, total: Mapping[Tensor, Tensor]) -> None:
    """Put sums in the place of g3."""
    sums = [total.get(param) for param in tensors.owners]
    kept = addresses_of(sums)
    for addresses in tensors.addresses:
        check_not_overwritten(tensors.params, kept, addresses, OVERWRITTEN)
    tensors.grads[2] = [
        torch.zeros_like(param) if sum_ is None else walkable(param, sum_, param.dtype)
        for param, sum_ in zip(tensors.params, sums, strict=True)
    ]
    if tensors.grad_dtype != tensors.key.dtype:
        widen_gradients(tensors)
    BACKENDS[tensors.key.backend].bind(tensors, 2, addresses_of(tensors.grads[2]))
