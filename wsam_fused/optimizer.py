"""The step that all methods share: its phases, with a closure and call by call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import cached_property, partial
from typing import Any, ClassVar

import torch

from wsam_fused.base_rules import device_learning_rate
from wsam_fused.call_by_call import StepsCallByCall
from wsam_fused.checkpoints import create_state
from wsam_fused.engine import StepEngine
from wsam_fused.in_backward import InBackwardUpdate
from wsam_fused.leftover_gradients import LeftoverGradients
from wsam_fused.loss_scale import ScaledSteps
from wsam_fused.method_keys import STEP
from wsam_fused.microbatches import step_with_microbatches
from wsam_fused.plan import Point
from wsam_fused.replicas import complete_apart
from wsam_fused.row import BASE_ROW, Row
from wsam_fused.second_evaluation import SecondEvaluation, step_with_second_evaluation

Closure = Callable[[], Any]


class SharpnessAwareOptimizer(ScaledSteps, StepsCallByCall):
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
    # Neither copied nor saved with the optimizer.
    _second_evaluation: SecondEvaluation | None = None

    # ---- the step ----------------------------------------------------------------------------

    @property
    def is_plain_step(self) -> bool:
        """Whether the next step is one of the base optimizer alone; see ``every``."""
        return (self._steps() + 1) % self._every != 0

    @property
    def second_evaluation(self) -> SecondEvaluation | None:
        """Computes the gradients of the same data at the weights as they are, by ``backward``.

        ``.grad`` is None when it is called; if it returns a scalar, that is
        ``last.perturbed_loss``. When it is set, ``step()`` without a closure makes the whole step:
        the gradients in ``.grad`` are g1, however they were accumulated, and it is called for each
        further one. An exception in it restores the weights. ``step(closure)`` does without it. It
        is neither copied nor saved with the optimizer.

        Raises:
            TypeError: It is set to something that cannot be called.
            RuntimeError: The method looks at the loss of every sample.
        """
        return self._second_evaluation

    @second_evaluation.setter
    def second_evaluation(self, function: SecondEvaluation | None) -> None:
        if function is not None:
            self._require_calls("second_evaluation")
            if not callable(function):
                raise TypeError(
                    f"second_evaluation is {function!r}, expected a function without arguments or "
                    "None"
                )
        self._second_evaluation = function

    @torch.no_grad()
    def first_step(
        self, zero_grad: bool = False, *, scaler: torch.amp.GradScaler | None = None
    ) -> None:
        """Perturb the weights by the gradients in ``.grad``.

        With ``every`` > 1, the steps between the sharpness-aware ones are made here, whole:
        ``is_perturbed`` says afterwards whether there is something to complete.

        Args:
            zero_grad: Take the gradients out of ``.grad`` (they live on inside the optimizer, no
                copy is made). With False ``.grad`` stays as it is, which costs a copy; clear it
                before the next backward, or that adds to it.
            scaler: Has scaled the loss. Complete the step by ``scaler.step(optimizer)`` and
                ``scaler.update()``; do not call ``scaler.unscale_()``. If ``is_perturbed`` is
                False afterwards (``every``), only by ``scaler.update()``.

        Raises:
            RuntimeError: No parameter has a gradient, the weights are perturbed already, the scaler
                has unscaled the gradients, or ``replay_rng=True`` and the evaluation was not made
                within ``same_randomness()``.
            TypeError: A gradient is sparse or complex, or ``scaler`` is no GradScaler.
        """
        self._require_calls("first_step()")
        self._require_idle("first_step()")
        plain = self.is_plain_step
        if not plain:
            self._require_replay(0, "first_step()")
            self._replicas.match_gradients(self)
        try:
            self._take_scaler(scaler)
            engine = self._begin(take=zero_grad, copy=not zero_grad and not plain)
        except BaseException:
            self.restore()
            raise
        try:
            engine.reduce(0)
            if plain:
                self._update([BASE_ROW] * len(self.param_groups), required=0b1)
                return
            engine.move_to(Point.ASCENT)
            self._replicas.begin(self, engine)
            self._batch_norm.save()
        except BaseException:
            self._replay.forget()
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
            RuntimeError: ``first_step`` has not been called, or ``replay_rng=True`` and the
                evaluation was not made within ``same_randomness()``; the weights are restored.
            TypeError: A gradient is sparse or complex; the weights are restored.
        """
        engine = self._require_read(1, "second_step()", "first_step()")
        self._require_replay(1, "second_step()")
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
                called, or the evaluation was not replayed, as in ``second_step``.
            TypeError: A gradient is sparse or complex; the weights are restored.
        """
        self._require_calls("third_step()")
        if self.evaluations < 3:
            name = type(self).__name__
            raise RuntimeError(f"third_step() was called, but {name} has two evaluations a step")
        self._require_read(2, "third_step()", "second_step()")
        self._require_replay(2, "third_step()")
        self._complete(zero_grad=zero_grad)

    def step(
        self,
        closure: Closure | Sequence[Closure] | None = None,
        *,
        scaler: torch.amp.GradScaler | None = None,
    ) -> Any:
        """Perform one whole step, or complete one that ``first_step`` began.

        Args:
            closure: Clears the gradients, computes the loss, calls ``backward`` and returns the
                loss; it is evaluated as often as the method needs. Gradients left over from before
                are cleared first. A list of closures is a step over micro-batches (m-SAM), of which
                each has a perturbation of its own and all have the same weight; for a shorter one,
                multiply its loss by its size over the mean size. Without a closure, a backward must
                have followed the last call, or ``second_evaluation`` be set; with learning rates
                and gradients of 0 and no state yet, the state is created, as
                ``torch.distributed.checkpoint`` asks for. The closures of a list
                must not use gradients after ``backward``: those of a perturbed evaluation are added
                up within it.
            scaler: Scales the loss in the closures, ``scaler.scale(loss).backward()``. Call
                ``scaler.update()`` afterwards, and not ``scaler.step()``. Without a closure,
                ``scaler.step(optimizer)`` is what calls this, and it is not given.

        Returns:
            The closure's loss at the unperturbed weights, for a list their mean; None without.

        Raises:
            RuntimeError: There is no closure and nothing to complete, or the scaler has called
                this with a closure.
            TypeError: The method takes no list of closures, or ``scaler`` is no GradScaler.
            ValueError: The list is empty.

        If a closure raises, the weights are restored and the state is untouched.
        """
        if closure is None:
            with self._called_by_scaler():
                self._complete_pending()
            return None
        self._require_calls("step(closure)")
        self._require_idle("step(closure)")
        self._refuse_closure_of_scaler()
        self._replicas.check_closure("step(closure)")
        if isinstance(closure, Sequence):
            return step_with_microbatches(self, closure, scaler)
        self._leftovers.clear(self)
        calls = (self.first_step, self.second_step, self.third_step)[: self.evaluations]
        losses: list[Any] = []
        try:
            for number, call in enumerate(calls):
                with torch.enable_grad(), self._evaluation(number):
                    losses.append(closure())
                self._leftovers.check()
                if call is calls[0]:
                    self.first_step(zero_grad=True, scaler=scaler)
                else:
                    call(zero_grad=call is not calls[-1])
                if not self.is_perturbed:  # a step of the base optimizer ends with the first call
                    break
        except BaseException:
            self.restore()
            self._leftovers.note(self)
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
        self._undo_step()

    # ---- parts of a step, for the methods that order them otherwise --------------------------

    def _evaluation(self, number: int) -> AbstractContextManager[object]:
        """Surround an evaluation that the step makes itself, 0 for the one at w."""
        stack = ExitStack()
        stack.enter_context(self._replicas.evaluation(self, number))
        if self._replay_rng:
            if number == 0:
                self._replay.forget()
            stack.enter_context(self._replay.evaluation(number, self._params()))
        return stack

    def _begin(self, *, take: bool, copy: bool = False) -> StepEngine:
        """Bring the hyper-parameters up to date and read the gradients at w."""
        self._method_keys.apply_schedules(self.param_groups)
        engine = self._current_engine()
        while not engine.read_first(take=take, copy=copy):
            engine = self._new_engine()
        self._set_loss_scale(engine)
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
            if self._replicas.perturb_apart:
                complete_apart(self, engine)
            else:
                engine.read_next()
                self._note_scaled(engine)
                self._update(self._method_rows(), required=self.required)
        except BaseException:
            self._replay.forget()
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
            steps = self._steps() + 1
            counts = [partial(group.__setitem__, STEP, steps) for group in self.param_groups]
            place = self._keeps_point()
            engine.update(rows, rates, method, required=required, keep_point=place, counts=counts)
        except BaseException:
            engine.abandon()
            raise
        self._tell_scaler(engine)
        self._replay.forget()
        self.last.begin(engine)
        self._leftovers.note(self)
        self._opt_called = True  # lr_scheduler looks for it

    def _keeps_point(self) -> bool:
        """Whether the update starts from where the last evaluation was."""
        return False

    def _complete_pending(self) -> None:
        """Complete the step in progress, or make one with ``second_evaluation``."""
        if self.is_perturbed:
            (self.second_step if self.evaluations == 2 else self.third_step)()
        elif create_state(self):
            return
        elif self.second_evaluation is not None:
            step_with_second_evaluation(self, self.second_evaluation)
        else:
            raise RuntimeError(
                "step() without a closure completes a step that first_step() began, but nothing is "
                "pending; call step(closure), or first_step() and backward() before, or set "
                "second_evaluation. docs/use_with.md says what frameworks need that call step() "
                "themselves"
            )

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients; see ``torch.optim.Optimizer.zero_grad``."""
        self._leftovers.forgive()
        super().zero_grad(set_to_none)

    @cached_property
    def _leftovers(self) -> LeftoverGradients:
        return LeftoverGradients()

    def _require_replay(self, evaluation: int, what: str) -> None:
        if self._replay_rng and not self._replay.has(evaluation):
            self.restore()
            raise RuntimeError(
                f"{what} was called with replay_rng=True, but the evaluation before it was not "
                "made within `with opt.same_randomness():`"
            )

    def _require_read(self, evaluations: int, what: str, before: str) -> StepEngine:
        self._require_calls(what)
        engine = self._engine
        if engine is None or engine.read != evaluations:
            raise RuntimeError(f"{what} was called before {before}")
        return engine
