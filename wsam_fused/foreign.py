"""Gives gradients to a base optimizer that is stepped as it is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.optim import Optimizer

from wsam_fused.backends import BACKENDS
from wsam_fused.base_rules import BaseRule
from wsam_fused.distributed import like
from wsam_fused.plan import GroupRow
from wsam_fused.tensor_list import TensorList
from wsam_fused.uninterrupted import Change, interrupts_deferred, make_together

if TYPE_CHECKING:
    from wsam_fused.engine import StepEngine


@contextmanager
def gradients_for_step(params: Sequence[Tensor], grads: Sequence[Tensor | None]) -> Iterator[None]:
    """Put ``grads`` into ``.grad`` while a base optimizer steps ``params``.

    They have the dtype of their parameters. They stay in ``.grad`` afterwards, except where the
    parameter says (``grad_dtype``) that its gradients are of another one.
    """
    asked: list[tuple[Tensor, torch.dtype]] = []
    try:
        for param, grad in zip(params, grads, strict=True):
            dtype = getattr(param, "grad_dtype", None)
            if grad is not None and dtype not in (None, grad.dtype):
                asked.append((param, dtype))
                param.grad = None
                param.grad_dtype = None
            param.grad = grad
        yield
    finally:
        for param, dtype in asked:
            param.grad = None
            param.grad_dtype = dtype


def step_foreign(
    engine: StepEngine,
    foreign: Optimizer,
    rows: list[GroupRow],
    rates: list[Tensor | None],
    required: int,
    counts: Sequence[Change],
) -> None:
    """Step a base optimizer with h, then subtract lr * d; the rule `none` left h and d.

    Args:
        engine: Has restored w.
        foreign: The base optimizer.
        rows: One per group.
        rates: Learning rates that only a device knows.
        required: Bit k: a parameter that has no gradient k + 1 is not updated.
        counts: Count the step.
    """
    params = [param for tensors in engine.lists.lists for param in tensors.owners]
    h = [
        like(param, _first_of(tensors, i)) if tensors.has_gradients(i, required) else None
        for tensors in engine.lists.lists
        for i, param in enumerate(tensors.owners)
    ]
    with gradients_for_step(params, h):
        # The one place that waits for the device: a foreign step cannot be skipped on it.
        if not bool(engine.all_known_are_finite()):
            make_together(counts)
            return
        with interrupts_deferred():  # its loops are Python
            foreign.step()
            _subtract(engine, rows, rates, required, counts)


def _subtract(
    engine: StepEngine,
    rows: list[GroupRow],
    rates: list[Tensor | None],
    required: int,
    counts: Sequence[Change],
) -> None:
    """Subtract lr * d and count the step."""
    if not any(any(row.d) for row in rows):
        make_together(counts)
        return
    plain = {"sign": 1.0, "h1": 0.0, "h2": 1.0, "h3": 0.0, "d1": 0.0, "d2": 0.0, "d3": 0.0}
    engine.set_rows([row._replace(**plain, max_norm=-1.0) for row in rows], rates)
    with engine.scale.taken_out():
        changes = []
        for tensors in engine.lists.lists:
            if tensors.reader.moved():  # some optimizers rebind `.data`
                engine.follow_storage(tensors, same_layout=True)
            subtract = BACKENDS[tensors.key.backend].updating(
                tensors,
                BaseRule.SGD,
                engine.read,
                required=required,
                checked=0,  # it would not have come here
                keep_point=False,
                count_skipped=False,
            )
            changes.append(subtract)
        make_together([*changes, *counts])


def _first_of(tensors: TensorList, index: int) -> Tensor | None:
    """Where the rule `none` has written h for a parameter."""
    g1 = tensors.grads[0][index]
    return tensors.grads[1][index] if g1 is None else g1
