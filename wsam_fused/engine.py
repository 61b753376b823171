"""Runs the three operations over the tensor lists of an optimizer, in the order of a step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.optim import Optimizer

from wsam_fused.autocast import forget_casts
from wsam_fused.backends import BACKENDS
from wsam_fused.base_rules import BaseRule
from wsam_fused.coefficients import derived, with_the_perturbation_of
from wsam_fused.foreign import step_foreign
from wsam_fused.gathered_weights import GatheredWeights
from wsam_fused.gradients import Gradients, check_not_overwritten
from wsam_fused.plan import GroupRow, Point, Slot
from wsam_fused.progress import UpdateProgress
from wsam_fused.reductions import SLOTS, reduce
from wsam_fused.row import Row
from wsam_fused.step_scale import StepScale
from wsam_fused.storage import follow_storage
from wsam_fused.tensor_list import TensorList
from wsam_fused.tensor_lists import TensorLists
from wsam_fused.uninterrupted import Change, make_together
from wsam_fused.widening import widen_gradients

_OVERWRITTEN = (
    "the second gradient of a parameter of shape {shape} was written over the first one, into "
    "memory that is kept for it (by a CUDA graph, say); the weights cannot be restored exactly. "
    "Call first_step(zero_grad=False), which copies the first gradients"
)


class StepEngine:
    """What happens to the tensor lists of an optimizer in a step.

    Args:
        lists: The parameters.
        check_all: Form the norm of every gradient, and skip a step in which one is not finite.
        reuse_first_gradient: Whether a backup of w may take the memory of g1.
        foreign: The base optimizer to be stepped where there is no fused update.
        gathered: What modules have gathered of sharded parameters.

    Attributes:
        lists: The parameters.
        foreign: The base optimizer, where there is no fused update.
        at: The point where the parameters are, unless the norm of g1 is not finite.
        read: How many gradients of the step in progress have been taken over.
        known: Of which of them the norms are known, 0 for g1; between steps, of the last one.
        knows_dot: Whether g1 . g2 is known, likewise.
        progress: Of the update of the step in progress.
        scale: Of the loss, in the step in progress.
    """

    def __init__(
        self,
        lists: TensorLists,
        *,
        check_all: bool,
        reuse_first_gradient: bool,
        foreign: Optimizer | None,
        gathered: GatheredWeights,
    ) -> None:
        self.lists = lists
        self.at = Point.WEIGHTS
        self.read = 0
        self.known: set[int] = set()
        self.knows_dot = False
        self.progress = UpdateProgress()
        self._check_all = check_all
        self.scale = StepScale(lists)
        self._reuse_first_gradient = reuse_first_gradient
        self.foreign = foreign
        self._gathered = gathered
        self._has_gradients = True

    @property
    def pending(self) -> bool:
        """Whether a step is in progress."""
        return self.read > 0 or self.at != Point.WEIGHTS

    @property
    def scalars(self) -> Tensor:
        """The scalars of the first device."""
        return self.lists.primary.scalars

    # ---- reading gradients -------------------------------------------------------------------

    def read_first(self, *, take: bool, copy: bool) -> bool:
        """Take over the gradients at w.

        Args:
            take: Leave None in ``.grad``.
            copy: Work on copies.

        Returns:
            False if the lists are outdated because a parameter has other storage than when they
            were made; nothing has been taken then.

        Raises:
            RuntimeError: No parameter has a gradient. Of sharded parameters another rank may have
                some, which is known after :meth:`reduce`.
            TypeError: A gradient is sparse or complex.
        """
        taken: list[tuple[TensorList, Gradients]] = []
        try:
            for tensors in self.lists.lists:
                tensors.follow_parameters()
                writes = self._writes_first_gradients(tensors)
                gradients = tensors.reader.read(take=take, copy=copy, writes=writes)
                taken.append((tensors, gradients))
            grads = (grad for _, gradients in taken for grad in gradients.tensors)
            self._has_gradients = any(grad is not None for grad in grads)
            if not self._has_gradients and self.lists.over_ranks is None:
                raise self._no_gradient()
            if any(gradients.moved for _, gradients in taken):
                _give_back(taken)
                return False
            self.known, self.knows_dot = set(), False
            for tensors, gradients in taken:
                tensors.grad_dtype = gradients.dtype
                self._bind(tensors, 0, gradients)
        except BaseException:
            _give_back(taken)
            raise
        self.read = 1
        return True

    def _no_gradient(self) -> RuntimeError:
        count = sum(len(tensors.params) for tensors in self.lists.lists)
        return RuntimeError(
            f"none of the {count} parameters has a gradient; call backward() before. If the model "
            "has others by now, as after load_state_dict(assign=True), it needs a new optimizer"
        )

    def read_next(self, *, take: bool = False, copy: bool = False) -> None:
        """Take over the gradients at the point where the parameters are.

        Args:
            take: Leave None in ``.grad``.
            copy: Work on copies.

        Raises:
            RuntimeError: A gradient has overwritten an earlier one, or a parameter has changed.
            TypeError: A gradient is sparse or complex.
        """
        for tensors, _ in self.lists:
            self.read_list(tensors, take=take, copy=copy)
        self.read += 1

    def read_list(self, tensors: TensorList, *, take: bool = False, copy: bool = False) -> None:
        """Take over those of one list; see :meth:`read_next`."""
        # The rule `none` writes h and d over the gradients.
        writes = self.read == 1 and tensors.key.rule == BaseRule.NONE
        gradients = tensors.reader.read(take=take, copy=copy, writes=writes)
        for earlier in tensors.addresses:
            check_not_overwritten(tensors.params, earlier, gradients.addresses, _OVERWRITTEN)
        if gradients.moved:
            self.follow_storage(tensors, same_layout=True)
        self._bind(tensors, self.read, gradients)
        if gradients.dtype != tensors.grad_dtype:
            widen_gradients(tensors)

    def _bind(self, tensors: TensorList, evaluation: int, gradients: Gradients) -> None:
        tensors.grads[evaluation] = gradients.tensors
        tensors.addresses.append(gradients.addresses.clone())
        BACKENDS[tensors.key.backend].bind(tensors, evaluation, gradients.addresses)

    def _writes_first_gradients(self, tensors: TensorList) -> bool:
        """Whether h or a copy of w take the memory of g1."""
        key = tensors.key
        return key.rule == BaseRule.NONE or (key.has_backup and self._reuse_first_gradient)

    def all_known_are_finite(self) -> Tensor:
        """Whether the norms that are known are finite, a scalar on the device.

        Also what others have found counts, see :meth:`StepScale.set_found_inf`.
        """
        slots = [self.scalars[SLOTS[evaluation]] for evaluation in sorted(self.known)]
        found = self.scalars[Slot.FOUND_INF] != 0
        return ~found if not slots else torch.isfinite(torch.cat(slots)).all() & ~found

    def forget_norms(self) -> None:
        """Do not tell the norms of this step: they are of something else than gradients."""
        self.known, self.knows_dot = set(), False

    # ---- the operations ----------------------------------------------------------------------

    def reduce(self, evaluation: int, *, with_first: bool = False) -> None:
        """Form the norm of the gradients of one evaluation, and their dot product with g1.

        Raises:
            RuntimeError: No parameter has a gradient at w on any rank.
        """
        has_gradients = self._has_gradients
        exist = reduce(self.lists, evaluation, with_first=with_first, has_gradients=has_gradients)
        # Only a rank without gradients has to know, and waits, whether others have some.
        if exist is not None and evaluation == 0 and not has_gradients and not bool(exist):
            raise self._no_gradient()
        self.knows_dot = self.knows_dot or with_first
        self.known.add(evaluation)

    def move_to(self, target: Point) -> None:
        """Move the parameters to another point.

        Autograd has been told by whoever read gradients just before; else see
        :meth:`_tell_autograd`.
        """
        leaves = self.at == Point.WEIGHTS
        if target != Point.WEIGHTS:
            self.at = target  # should it fail half-way, some are there
        for tensors, backend in self.lists:
            if tensors.key.has_backup or target == Point.PROBE:
                if leaves:
                    reuse = self._reuse_first_gradient and target != Point.PROBE
                    tensors.make_backups(reuse)
                elif tensors.backups is None:
                    continue  # it failed before this list was moved
            backend.perturb(tensors, target)
        if target == Point.WEIGHTS:
            for tensors in self.lists.lists:
                tensors.drop_backups()
            self.at = target
        self._forget_copies()

    def return_to_weights(self) -> None:
        """Move the parameters back to w, wherever their memory is by now."""
        self._follow_moved()
        self._move_back()

    def _follow_moved(self) -> None:
        for tensors, _ in self.lists:
            if tensors.reader.moved():
                self.follow_storage(tensors, same_layout=False)

    def _move_back(self) -> None:
        """Move the parameters back to w; it goes on where it was if it was broken off."""
        self._tell_autograd()
        try:
            self.move_to(Point.WEIGHTS)
        except KeyboardInterrupt:  # a second one, while the first was dealt with
            self.move_to(Point.WEIGHTS)
            raise

    def _tell_autograd(self) -> None:
        """Let autograd know that what it saved of the parameters is about to be outdated."""
        for tensors, _ in self.lists:
            increment_version(tensors.params)
            if tensors.key.sharding is not None:
                increment_version(tensors.owners)

    def probe(self, seed: int) -> None:
        """Move the parameters along noise, without a gradient.

        Args:
            seed: What the noise follows from, a whole number below 2^53.
        """
        for tensors, backend in self.lists:
            tensors.shared.scalars[Slot.SEED].fill_(seed)
            none = torch.zeros(len(tensors.params), dtype=torch.int64, device="cpu")
            backend.bind(tensors, 0, none)
        self._tell_autograd()
        self.move_to(Point.PROBE)

    def update(
        self,
        rows: list[GroupRow],
        rates: list[Tensor | None],
        method: Sequence[Row],
        *,
        required: int,
        keep_point: bool = False,
        counts: Sequence[Change] = (),
    ) -> None:
        """Restore w and update it with the gradients that have been read.

        Args:
            rows: One per group.
            rates: Learning rates that only a device knows.
            method: The method's rows, one per group.
            required: Bit k: a parameter that has no gradient k + 1 is not updated.
            keep_point: Start from where the parameters are and not from w.
            counts: Count the step.
        """
        if not self.progress.has_coefficients:
            rows = self.begin_update(rows, rates)
        self.derive(rows, method)
        updates = [
            self.updating(tensors, required=required, keep_point=keep_point)
            for tensors, _ in self.lists
        ]
        if self.foreign is None:
            make_together([*updates, *counts])
        else:
            make_together(updates)
            step_foreign(self, self.foreign, rows, rates, required, counts)
        self.finish()

    def begin_update(self, rows: list[GroupRow], rates: list[Tensor | None]) -> list[GroupRow]:
        """Bring the coefficients up to date and return them; see :meth:`update`."""
        if self.at != Point.WEIGHTS:
            rows = with_the_perturbation_of(self.lists.primary.rows, rows)
        self.set_rows(rows, rates)
        self.progress.has_coefficients = True
        return rows

    def derive(
        self, rows: list[GroupRow], method: Sequence[Row], shares: Sequence[float] | None = None
    ) -> None:
        """Form the norms that are asked for, and the coefficients that depend on them.

        Args:
            rows: One per group.
            method: The method's rows, one per group.
            shares: Factors of the coefficients, one per group; 1 by default.
        """
        derives = any(row.derive is not None for row in method)
        needs_dot = any(row.needs_dot for row in method)
        for evaluation in range(self.read):
            checks = self._check_all or self.progress.checks_all or derives
            if evaluation not in self.known and checks:
                self.reduce(evaluation, with_first=needs_dot and evaluation == 1)
        if derives:
            for shared in self.lists.shared.values():
                foreign = self.foreign is not None
                found = derived(shared.scalars, rows, method, foreign=foreign)
                if shares is not None:
                    pairs = zip(found, shares, strict=True)
                    found = [{n: each * c for n, c in row.items()} for row, each in pairs]
                shared.set_derived(found)

    def set_rows(self, rows: list[GroupRow], rates: list[Tensor | None]) -> None:
        """Bring the group tables up to date."""
        self.lists.set_rows(rows)
        for shared in self.lists.shared.values():
            shared.set_learning_rates(rates)

    def updating(self, tensors: TensorList, *, required: int, keep_point: bool) -> Change:
        """Return what restores and updates one list with the gradients that it has."""
        counts = tensors.shared is self.lists.primary and not self.progress.has_counted
        self.progress.has_counted |= counts
        return BACKENDS[tensors.key.backend].updating(
            tensors,
            tensors.key.rule,
            len(tensors.addresses),
            required=required,
            checked=sum(1 << evaluation for evaluation in self.known),
            keep_point=keep_point,
            count_skipped=counts,
        )

    # ---- the end -----------------------------------------------------------------------------

    def abandon(self) -> None:
        """Put the weights back if they are somewhere else, and forget the step.

        If that fails (there is no memory for it, say), the step stays pending for another try.
        """
        failed = self.pending
        moves = False
        try:
            if self.at != Point.WEIGHTS:
                self._follow_moved()
                moves = True
                self._move_back()
        finally:
            if not moves or self.at == Point.WEIGHTS:
                self.finish()
                if failed:
                    self._gathered.forget_failed()

    def finish(self) -> None:
        """Forget the gradients and the copies of a step."""
        self._forget_copies()
        self.at = Point.WEIGHTS
        self.read = 0
        self.progress = UpdateProgress()
        for tensors in self.lists.lists:
            tensors.release()

    def _forget_copies(self) -> None:
        """Let others forget what they have made of the weights, which are elsewhere now."""
        forget_casts()
        self._gathered.forget()

    def follow_storage(self, tensors: TensorList, *, same_layout: bool) -> None:
        """Go on with parameters whose memory was exchanged since they were perturbed."""
        stale = self.lists.stale or tensors.reader.layouts() != tensors.reader.noted_layouts
        self.lists.stale = True  # should it fail
        follow_storage(tensors, same_layout=same_layout)
        self.lists.stale = stale
        BACKENDS[tensors.key.backend].refresh(tensors)


def _give_back(taken: Sequence[tuple[TensorList, Gradients]]) -> None:
    for tensors, gradients in taken:
        tensors.reader.give_back(gradients.tensors)
