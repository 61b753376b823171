"""m-SAM: a step over micro-batches, each with a perturbation of its own.

Math, over K micro-batches of a batch:
    g1_k = gradient of micro-batch k at w,   e_k from g1_k alone,   g2_k at w + e_k
    a method that is linear in its gradients:  base(w, row of mean g1_k and mean g2_k)
    one that is not (its coefficients are derived):  base(w, mean of the rows of g1_k and g2_k)

Besides the two gradient lists of one micro-batch there is at most one more: what the second
gradients add up to is formed parameter by parameter within the backward, unless the row needs all
of them at once.

Reference: Foret et al., ICLR 2021, section 4 (m-sharpness).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from wsam_fused.averages import is_distributed
from wsam_fused.backends import BACKENDS
from wsam_fused.base_rules import BaseRule
from wsam_fused.coefficients import with_the_perturbation_of
from wsam_fused.distributed import like
from wsam_fused.engine import StepEngine
from wsam_fused.foreign import gradients_for_step
from wsam_fused.gradients import check_not_overwritten, walkable
from wsam_fused.in_backward import refuse_while_active
from wsam_fused.kept_memory import KeptSums
from wsam_fused.plan import GroupRow, Point, Slot, addresses_of
from wsam_fused.row import BASE_ROW, Row
from wsam_fused.sharded_gradients import local_gradient
from wsam_fused.tensor_list import TensorList

if TYPE_CHECKING:
    from wsam_fused.optimizer import SharpnessAwareOptimizer

Closure = Callable[[], Any]

_OVERWRITTEN = (
    "the gradient of a parameter of shape {shape} was written over one that is still in use, that "
    "at w or the sum over earlier micro-batches; closures must not leave their gradients in memory "
    "that they use again"
)


def step_with_microbatches(
    optimizer: SharpnessAwareOptimizer,
    closures: Sequence[Closure],
    scaler: torch.amp.GradScaler | None = None,
) -> Any:
    """Perform one step; see :meth:`SharpnessAwareOptimizer.step`.

    Returns:
        The mean of the losses at the unperturbed weights.

    Raises:
        RuntimeError: Parameters are updated within the backward.
        TypeError: The method does not work with micro-batches, or a closure is none.
        ValueError: There are no closures.
    """
    if not optimizer.takes_microbatches:
        raise TypeError(
            f"step() was given a list of closures, which {type(optimizer).__name__} does not take; "
            "expected one closure"
        )
    if not closures:
        raise ValueError("step() was given an empty list, expected a closure for each micro-batch")
    for closure in closures:
        if not callable(closure):
            raise TypeError(f"step() was given {closure!r} in a list, expected closures only")
    reason = "the gradients of all micro-batches have to be added up before the update"
    refuse_while_active(optimizer, "step() was given a list of closures", reason)
    optimizer.zero_grad()
    try:
        optimizer._take_scaler(scaler)
        return _MicrobatchStep(optimizer, closures).run()
    except BaseException:
        optimizer.restore()
        optimizer.zero_grad()
        raise


class _MicrobatchStep:
    """The step in progress.

    Args:
        optimizer: Whose step it is.
        closures: One for each micro-batch.
    """

    def __init__(self, optimizer: SharpnessAwareOptimizer, closures: Sequence[Closure]) -> None:
        self._optimizer = optimizer
        self._closures = closures
        self._share = 1.0 / len(closures)
        self._params = [p for group in optimizer.param_groups for p in group["params"]]

    def run(self) -> Any:
        """Evaluate everything, update, and return the mean loss."""
        optimizer = self._optimizer
        method = optimizer._method_rows()
        if optimizer.is_plain_step:
            return self._run_plain()
        if any(row.derive is not None for row in method):
            return self._run_derived(method)
        return self._run_linear(method)

    def _run_plain(self) -> Any:
        optimizer = self._optimizer
        first = GradientSum(optimizer._kept_sums[0], self._share)
        losses = []
        for closure in self._closures:
            with self._adding_up(first):
                losses.append(closure())
        update_with_means(optimizer, [BASE_ROW] * len(optimizer.param_groups), 0b1, first.values)
        return self._note(losses, [])

    def _run_linear(self, method: list[Row]) -> Any:
        optimizer = self._optimizer
        first, second = (GradientSum(kept, self._share) for kept in optimizer._kept_sums)
        losses, perturbed = [], []
        poison = None
        for closure in self._closures:
            losses.append(self._perturb_by(closure))
            with self._adding_up(second, self._first_addresses()), optimizer._evaluation(1):
                perturbed.append(closure())
            self._go_back()
            if optimizer.uses_first_gradient:
                for tensors in self._engine.lists.lists:
                    first.add(tensors.owners, tensors.grads[0])
            else:
                poison = poison_of(self._engine, poison)
            self._engine.finish()
        if optimizer.uses_first_gradient:
            required = optimizer.required
            update_with_means(optimizer, method, required, first.values, second.values)
        else:  # h is g2, with a weight of 1
            self._update_with_h(second.values, poison, is_scaled=True)
        return self._note(losses, perturbed)

    def _run_derived(self, method: list[Row]) -> Any:
        optimizer = self._optimizer
        total: dict[Tensor, Tensor] = {}
        losses, perturbed = [], []
        poison = None
        for closure in self._closures:
            losses.append(self._perturb_by(closure))
            with torch.enable_grad(), self._apart(1):
                perturbed.append(closure())
            with torch.no_grad():
                optimizer._batch_norm.restore()
                self._engine.read_next(take=True)
                poison = poison_of(self._engine, poison)
                rows = optimizer._rows(method)
                total = combine(self._engine, rows, method, self._share, total)
        self._update_with_h(total, poison, is_scaled=False)
        return self._note(losses, perturbed)

    @property
    def _engine(self) -> Any:
        return self._optimizer._engine

    def _perturb_by(self, closure: Closure) -> Any:
        """Evaluate the gradient at w and go to its ascent point."""
        with torch.enable_grad(), self._apart(0):
            loss = closure()
        with torch.no_grad():
            engine = self._optimizer._begin(take=True)
            engine.reduce(0)
            engine.move_to(Point.ASCENT)
            self._optimizer._batch_norm.save()
        return loss

    @torch.no_grad()
    def _go_back(self) -> None:
        self._optimizer._batch_norm.restore()
        self._engine.return_to_weights()

    @contextmanager
    def _adding_up(
        self, total: GradientSum, first: Mapping[Tensor, int] | None = None
    ) -> Iterator[None]:
        """Add every gradient to a total as soon as it is complete, and let go of it.

        Args:
            total: The sum.
            first: Addresses of the gradients at w, if these are others: what has none does not
                count, as in a step with one closure.
        """

        def add(param: Tensor) -> None:
            grad = local_gradient(param)
            if grad is not None:
                used = first is not None and grad.data_ptr() == first.get(param)
                if used and grad.numel():
                    raise RuntimeError(_OVERWRITTEN.format(shape=tuple(param.shape)))
                if first is None or param in first:
                    total.add([param], [grad])
                param.grad = None

        self._optimizer.zero_grad()
        replicas = self._optimizer._replicas
        hooks = []
        # Else gradients may still be averaged after the hooks of their parameters have run.
        if replicas.perturb_apart or not is_distributed():
            hooks = [
                param.register_post_accumulate_grad_hook(add)
                for param in self._params
                if param.requires_grad
            ]
        try:
            with torch.enable_grad(), replicas.unsynced():
                yield
        finally:
            for hook in hooks:
                hook.remove()
        for param in self._params:  # without hooks, and what a closure has put there itself
            add(param)

    def _first_addresses(self) -> dict[Tensor, int]:
        return {
            param: address
            for tensors in self._engine.lists.lists
            for param, address, grad in zip(
                tensors.owners, tensors.addresses[0].tolist(), tensors.grads[0], strict=True
            )
            if grad is not None
        }

    @contextmanager
    def _apart(self, number: int) -> Iterator[None]:
        """Surround evaluation ``number`` of a micro-batch, whose gradients stay on this rank."""
        optimizer = self._optimizer
        with optimizer._evaluation(number), optimizer._replicas.unsynced():
            yield

    def _update_with_h(
        self, total: dict[Tensor, Tensor], poison: Tensor | None, *, is_scaled: bool
    ) -> None:
        assert poison is not None  # there is a closure
        poison = self._optimizer._replicas.poisoned_anywhere(poison)
        update_with_h(self._optimizer, total, poison, is_scaled=is_scaled)

    def _note(self, losses: list[Any], perturbed: list[Any]) -> Any:
        loss, perturbed_loss = _mean(losses), _mean(perturbed)
        self._optimizer.last.set_losses(loss, perturbed_loss)
        return loss


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
        backend.update(
            tensors,
            BaseRule.NONE,
            3 if total else engine.read,
            required=required,
            checked=0,  # what is not finite makes the sum so
            keep_point=False,
            count_skipped=False,
        )
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
        check_not_overwritten(tensors.params, kept, addresses, _OVERWRITTEN)
    tensors.grads[2] = [
        torch.zeros_like(param) if sum_ is None else walkable(param, sum_, param.dtype)
        for param, sum_ in zip(tensors.params, sums, strict=True)
    ]
    if tensors.grad_dtype != tensors.key.dtype:
        engine.widen_gradients(tensors)
    BACKENDS[tensors.key.backend].bind(tensors, 2, addresses_of(tensors.grads[2]))


class GradientSum:
    """Adds up gradients by parameter, each times the same share.

    Args:
        kept: Where the memory comes from.
        share: The factor.

    Attributes:
        values: The sums so far; of DTensors, a rank's own part.
    """

    def __init__(self, kept: KeptSums, share: float) -> None:
        self._kept = kept
        self._share = share
        self.values: dict[Tensor, Tensor] = {}

    @torch.no_grad()
    def add(self, params: Sequence[Tensor], grads: Sequence[Tensor | None]) -> None:
        """Add the gradients that there are."""
        for param, grad in zip(params, grads, strict=True):
            if grad is None:
                continue
            if param in self.values:
                self.values[param].add_(grad, alpha=self._share)
            else:
                self.values[param] = self._kept.begin(param, grad, self._share)


def _mean(losses: list[Any]) -> Any:
    if not losses or any(loss is None for loss in losses):
        return None
    detached = [loss.detach() if isinstance(loss, Tensor) else loss for loss in losses]
    return sum(detached[1:], detached[0]) / len(losses)
