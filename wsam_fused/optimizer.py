"""The step that all methods share: its phases, with a closure and call by call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch

from wsam_fused.base_rules import device_learning_rate
from wsam_fused.engine import StepEngine
from wsam_fused.in_backward import InBackwardUpdate
from wsam_fused.method_keys import STEP
from wsam_fused.method_optimizer import MethodOptimizer
from wsam_fused.microbatches import step_with_microbatches
from wsam_fused.plan import Point
from wsam_fused.row import BASE_ROW, Row

Closure = Callable[[], Any]


class SharpnessAwareOptimizer(MethodOptimizer):
    """Base class: everything but the row of coefficients.

    A step evaluates the gradient at w and at perturbed neighbours, then restores w and updates it
    with the combination that the method's :class:`~wsam_fused.row.Row` states. Subclasses define
    :meth:`row`.
    """

    # How often a step evaluates the gradient.
    evaluations: ClassVar[int] = 2
    # Bit k: a parameter that has no gradient from evaluation k + 1 is not updated.
    required: ClassVar[int] = 0b11
    # Whether step() takes a list of closures, one for each micro-batch.
    takes_microbatches: ClassVar[bool] = False
    # What methods without the two-call form say.
    instead_of_calls: ClassVar[str | None] = None

    # ---- the step ----------------------------------------------------------------------------

    @property
    def is_plain_step(self) -> bool:
        """Whether the next step is one of the base optimizer alone; see ``every``."""
        return (self._steps() + 1) % self._every != 0

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        """Perturb the weights by the gradients in ``.grad``.

        With ``every`` > 1, the steps between the sharpness-aware ones are made here, whole:
        ``is_perturbed`` says afterwards whether there is something to complete.

        Args:
            zero_grad: Take the gradients out of ``.grad`` (they live on inside the optimizer, no
                copy is made). With False ``.grad`` stays as it is, which costs a copy; clear it
                before the next backward, or that adds to it.

        Raises:
            RuntimeError: No parameter has a gradient, or the weights are perturbed already.
            TypeError: A gradient is sparse or complex.
        """
        self._require_calls("first_step()")
        self._require_idle("first_step()")
        plain = self.is_plain_step
        engine = self._begin(take=zero_grad, copy=not zero_grad and not plain)
        if plain:
            engine.reduce(0)
            self._update([BASE_ROW] * len(self.param_groups), required=0b1)
            return
        try:
            engine.reduce(0)
            engine.move_to(Point.ASCENT)
            self._batch_norm.save()
        except BaseException:
            engine.abandon()
            raise

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        """Take the gradients at the ascent point; restore the weights and update them.

        A parameter that got a gradient in only some of the evaluations is restored and not
        updated; one without any is left alone, as in ``torch.optim``. A method with three
        evaluations moves to the descent point instead.

        Args:
            zero_grad: Set ``.grad`` to None afterwards. Before a third evaluation, take the
                gradients out of it without a copy, as in ``first_step``.

        Raises:
            RuntimeError: ``first_step`` has not been called.
            TypeError: A gradient is sparse or complex; the weights are restored.
        """
        engine = self._require_read(1, "second_step()", "first_step()")
        if self.evaluations == 2:
            self._complete(zero_grad=zero_grad)
            return
        try:
            engine.read_next(take=zero_grad, copy=not zero_grad)
            engine.move_to(Point.DESCENT)
        except BaseException:
            self.restore()
            raise

    @torch.no_grad()
    def third_step(self, zero_grad: bool = False) -> None:
        """Take the gradients at the descent point; restore the weights and update them.

        Args:
            zero_grad: Set ``.grad`` to None afterwards.

        Raises:
            RuntimeError: The method has no third evaluation, or ``second_step`` has not been
                called.
            TypeError: A gradient is sparse or complex; the weights are restored.
        """
        self._require_calls("third_step()")
        if self.evaluations < 3:
            name = type(self).__name__
            raise RuntimeError(f"third_step() was called, but {name} has two evaluations a step")
        self._require_read(2, "third_step()", "second_step()")
        self._complete(zero_grad=zero_grad)

    def step(self, closure: Closure | Sequence[Closure] | None = None) -> Any:
        """Perform one whole step, or complete one that ``first_step`` began.

        Args:
            closure: Clears the gradients, computes the loss, calls ``backward`` and returns the
                loss; it is evaluated as often as the method needs. Gradients left over from before
                are cleared first. A list of closures is a step over micro-batches (m-SAM), of which
                each has a perturbation of its own and all have the same weight; for a shorter one,
                multiply its loss by its size over the mean size. Without a closure, a backward must
                have followed the last call. The closures of a list must not use gradients after
                ``backward``: those of a perturbed evaluation are added up within it.

        Returns:
            The closure's loss at the unperturbed weights, for a list their mean; None without.

        Raises:
            RuntimeError: There is no closure and nothing to complete.
            TypeError: The method takes no list of closures.
            ValueError: The list is empty.

        If a closure raises, the weights are restored and the state is untouched.
        """
        if closure is None:
            self._complete_pending()
            return None
        self._require_calls("step(closure)")
        self._require_idle("step(closure)")
        if isinstance(closure, Sequence):
            return step_with_microbatches(self, closure)
        self.zero_grad()
        calls = (self.first_step, self.second_step, self.third_step)[: self.evaluations]
        losses = []
        try:
            for call in calls:
                with torch.enable_grad():
                    losses.append(closure())
                call(zero_grad=call is not calls[-1])
                if not self.is_perturbed:  # a step of the base optimizer ends with the first call
                    break
        except BaseException:
            self.restore()
            raise
        self.last.set_losses(losses[0], losses[1] if len(losses) > 1 else None)
        return losses[0]

    def update_in_backward(self) -> InBackwardUpdate:
        """Update every parameter within the backward of a step's last evaluation.

        As soon as the second gradient of a parameter is complete, it is restored and updated and
        both its gradients are freed: besides the shrinking list of first gradients only those of
        the largest parameter are alive. Parameters that are small against the largest one are
        updated a few at a time, with what ``second_step`` would do; that and ``step`` do the rest
        (parameters without a second gradient, the count of the step).

        What is different while it is active: hyper-parameters of the update are those at the first
        parameter's; ``.grad`` is None afterwards, so that nothing can be done to second gradients
        after ``backward``; an evaluation has one ``backward``, in a step in progress no other may
        reach the parameters. If one fails half-way, what had been updated stays so and the others
        are restored. Copies of w that a geometry, ``restore="backup"`` or 16 bits need are freed
        likewise and not kept for the next step. A model under ``torch.compile`` gives all gradients
        at once: that works and saves nothing.

        Returns:
            The handle, with ``active`` and ``remove()``, which is also a context manager. The
            optimizer keeps it; copies of the optimizer do not have it.

        Raises:
            RuntimeError: It is active already, the weights are perturbed, or several processes
                average gradients after the hooks have run, as DistributedDataParallel does.
            TypeError: The method needs norms of the second gradient (``GSAM``, ``BSAM``), or the
                base optimizer has no fused update.
            ValueError: ``max_grad_norm`` or ``check_finite`` need them.
        """
        return InBackwardUpdate(self)

    @torch.no_grad()
    def restore(self) -> None:
        """Put the weights back if they are perturbed and forget the step; else do nothing."""
        if self._engine is not None:
            self._batch_norm.restore()
            self._engine.abandon()

    # ---- parts of a step, for the methods that order them otherwise --------------------------

    def _begin(self, *, take: bool, copy: bool = False) -> StepEngine:
        """Bring the hyper-parameters up to date and read the gradients at w."""
        self._method_keys.apply_schedules(self.param_groups)
        engine = self._current_engine()
        while not engine.read_first(take=take, copy=copy):
            engine = self._new_engine()
        return engine

    def _begin_without_gradients(self) -> StepEngine:
        """Bring the hyper-parameters up to date, for a method that moves before it differentiates.

        Raises:
            RuntimeError: No parameter requires a gradient.
        """
        self._method_keys.apply_schedules(self.param_groups)
        engine = self._current_engine()
        if any(tensors.reader.moved() for tensors in engine.lists.lists):
            engine = self._new_engine()
        if not engine.lists.lists:
            raise RuntimeError("no parameter requires a gradient")
        return engine

    def _complete(self, *, zero_grad: bool) -> None:
        """Take the last gradients, restore the weights and update them."""
        engine = self._engine
        assert engine is not None  # the caller has looked
        try:
            self._batch_norm.restore()
            engine.read_next()
            self._update(self._method_rows(), required=self.required)
        except BaseException:
            engine.abandon()
            raise
        if zero_grad:
            self.zero_grad()

    def _update(self, method: list[Row], *, required: int) -> None:
        """Update with the gradients that have been read, and count the step."""
        engine = self._engine
        assert engine is not None  # the caller has it
        try:
            rates = [device_learning_rate(group) for group in self.param_groups]
            rows = self._rows(method)
            engine.update(rows, rates, method, required=required, keep_point=self._keeps_point())
        except BaseException:
            engine.abandon()
            raise
        self.last.begin(engine)
        self._opt_called = True  # lr_scheduler looks for it
        steps = self._steps() + 1
        for group in self.param_groups:
            group[STEP] = steps

    def _keeps_point(self) -> bool:
        """Whether the update starts from where the last evaluation was."""
        return False

    def _complete_pending(self) -> None:
        """Complete the step in progress with the gradients that the last backward gave."""
        if not self.is_perturbed:
            raise RuntimeError(
                "step() without a closure completes a step that first_step() began, but nothing is "
                "pending; call step(closure), or first_step() and backward() before"
            )
        (self.second_step if self.evaluations == 2 else self.third_step)()

    def _require_calls(self, what: str) -> None:
        if self.instead_of_calls is not None:
            raise RuntimeError(f"{type(self).__name__} has no {what}; {self.instead_of_calls}")

    def _require_read(self, evaluations: int, what: str, before: str) -> StepEngine:
        self._require_calls(what)
        engine = self._engine
        if engine is None or engine.read != evaluations:
            raise RuntimeError(f"{what} was called before {before}")
        return engine
