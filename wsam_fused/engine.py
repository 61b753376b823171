"""Runs the three operations over the tensor lists of an optimizer, in the order of a step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from wsam_fused.backends import BACKENDS, Backend, Choice, select
from wsam_fused.base_rules import BaseRule
from wsam_fused.foreign import gradients_for_step
from wsam_fused.gradients import Gradients, check_not_overwritten, walkable
from wsam_fused.parameters import check_separate, is_dense
from wsam_fused.plan import Geometry, GroupRow, PointerTable, Slot, addresses_of
from wsam_fused.shared_scalars import SharedScalars
from wsam_fused.storage import follow_storage
from wsam_fused.tensor_list import (
    LOW_PRECISION,
    ListKey,
    TensorList,
    state_tensor,
)


class GroupKind(NamedTuple):
    """What of a parameter group decides which kernels run for it."""

    rule: BaseRule
    geometry: Geometry
    wants_backup: bool


class StepEngine:
    """The tensor lists of an optimizer and what happens to them in a step.

    Args:
        param_groups: The optimizer's groups. Parameters that are frozen and have no gradient are
            left out until they get one.
        kinds: One per group.
        state: The optimizer's state; missing entries are created, existing ones adopted.
        check_second: Form the norm of g2, and skip a step in which it is not finite.
        backend: ``"auto"`` or the name of a backend.
        reuse_first_gradient: Whether a backup of w may take the memory of g1.
        foreign: The base optimizer to be stepped where there is no fused update.
        step_counts: Updates that parameters have had, where the state does not say.

    Raises:
        ValueError: Two parameters share memory, or a state does not fit its parameter.
    """

    def __init__(
        self,
        param_groups: Sequence[Mapping[str, Any]],
        kinds: Sequence[GroupKind],
        state: MutableMapping[Tensor, Any],
        *,
        check_second: bool,
        backend: str,
        reuse_first_gradient: bool,
        foreign: Optimizer | None,
        step_counts: Mapping[Tensor, float],
    ) -> None:
        self.kinds = list(kinds)
        self.pending = False
        self.choices: dict[Tensor, Choice] = {}
        self._state = state
        self._check_second = check_second
        self._reuse_first_gradient = reuse_first_gradient
        self._foreign = foreign
        self._left_out: list[Tensor] = []
        members: dict[ListKey, list[tuple[Tensor, int]]] = defaultdict(list)
        for index, (group, kind) in enumerate(zip(param_groups, kinds, strict=True)):
            for param in group["params"]:
                if param.requires_grad or param.grad is not None:
                    members[self._key_of(param, kind, backend)].append((param, index))
                else:
                    self._left_out.append(param)
        check_separate(param for list_ in members.values() for param, _ in list_)
        devices = dict.fromkeys(key.device for key in members) or [torch.device("cpu")]
        self._shared = {device: SharedScalars(device) for device in devices}
        self.primary = next(iter(self._shared.values()))
        self.lists = [self._new_list(key, list_, step_counts) for key, list_ in members.items()]
        self._state_size = len(state)
        self.stale = False

    def _key_of(self, param: Tensor, kind: GroupKind, backend: str) -> ListKey:
        walkable = param.numel() > 0 and is_dense(param)
        choice = select(backend, param.device, param.dtype, walkable=walkable)
        self.choices[param] = choice
        has_backup = (
            kind.wants_backup or kind.geometry != Geometry.EUCLIDEAN or param.dtype in LOW_PRECISION
        )
        return ListKey(param.device, param.dtype, choice.name, kind.rule, kind.geometry, has_backup)

    def _new_list(
        self,
        key: ListKey,
        members: list[tuple[Tensor, int]],
        step_counts: Mapping[Tensor, float],
    ) -> TensorList:
        params = [param for param, _ in members]
        rule = key.rule
        entries = [self._state.get(param, {}) for param in params]
        counts = [
            _updates_so_far(rule, entry, step_counts.get(param))
            for param, entry in zip(params, entries, strict=True)
        ]
        steps = torch.tensor(counts, dtype=torch.float32, device=key.device)
        states = [
            [state_tensor(p, e.get(name), name) for p, e in zip(params, entries, strict=True)]
            for name in rule.state_keys
        ]
        for i, param in enumerate(params):  # every tensor is good: now the state may change
            if rule.keeps_step:
                self._state[param]["step"] = steps[i]
            for name, tensors in zip(rule.state_keys, states, strict=True):
                self._state[param][name] = tensors[i]
        groups = [index for _, index in members]
        # The rule `none` writes to the gradients what the foreign optimizer reads.
        lower = BACKENDS[key.backend].GRADIENT_DTYPES.get(key.dtype, ())
        grad_dtypes = () if rule == BaseRule.NONE else lower
        shared = self._shared[key.device]
        return TensorList(key, params, groups, shared, states, steps, grad_dtypes)

    # ---- is it still right? ------------------------------------------------------------------

    def outdated(self, kinds: Sequence[GroupKind], state: MutableMapping[Tensor, Any]) -> bool:
        """Whether the lists do not fit the groups any more and have to be made anew.

        Parameters whose memory was exchanged are noticed later, when the gradients are read.
        """
        return (
            self.stale
            or kinds != self.kinds
            or state is not self._state
            or self._lost_state()
            or any(param.grad is not None for param in self._left_out)
        )

    def _lost_state(self) -> bool:
        """Whether entries that the kernels write to are gone; others come and go as they like."""
        if self._foreign is not None or len(self._state) == self._state_size:
            return False
        self._state_size = len(self._state)
        return any(
            param not in self._state
            for tensors in self.lists
            if tensors.key.rule.state_keys
            for param in tensors.params
        )

    def is_captured(self) -> bool:
        """Whether the replays of a CUDA graph write to the tables, which then have to stay."""
        tables = [tensors.table for tensors in self.lists if tensors.table is not None]
        owners: list[SharedScalars | PointerTable] = [*self._shared.values(), *tables]
        return any(owner.is_captured() for owner in owners)

    def step_counts(self) -> dict[Tensor, float]:
        """Updates that each parameter has had."""
        return {
            param: count
            for tensors in self.lists
            for param, count in zip(tensors.params, tensors.steps.tolist(), strict=True)
        }

    # ---- the step ----------------------------------------------------------------------------

    def set_rows(self, rows: list[GroupRow], rates: list[Tensor | None] | None = None) -> None:
        """Bring the coefficients and hyper-parameters of the groups up to date.

        Args:
            rows: One per group.
            rates: Learning rates that only a device knows, for an update that is about to follow.
        """
        for shared in self._shared.values():
            shared.set_rows(rows)
            if rates is not None:
                shared.set_learning_rates(rates)

    def read_first(self, *, keep: bool) -> bool:
        """Take over the gradients at w.

        Args:
            keep: Leave ``.grad`` as it is and work on copies; else it becomes None.

        Returns:
            False if the lists are outdated because a parameter has other storage than when they
            were made; nothing has been taken then.

        Raises:
            RuntimeError: No parameter has a gradient.
            TypeError: A gradient is sparse or complex.
        """
        taken: list[tuple[TensorList, Gradients]] = []
        try:
            for tensors in self.lists:
                gradients = tensors.reader.read(
                    take=not keep, copy=keep, writes=self._writes_first_gradients(tensors)
                )
                taken.append((tensors, gradients))
            if all(grad is None for _, gradients in taken for grad in gradients.tensors):
                count = sum(len(tensors.params) for tensors in self.lists)
                raise RuntimeError(
                    f"none of the {count} parameters has a gradient; call backward() before"
                )
        except BaseException:
            _give_back(taken)
            raise
        if any(gradients.moved for _, gradients in taken):
            _give_back(taken)
            return False
        for tensors, gradients in taken:
            tensors.grads[0], tensors.grad_dtype = gradients.tensors, gradients.dtype
            tensors.first_addresses = gradients.addresses.clone()
            BACKENDS[tensors.key.backend].bind(tensors, 0, gradients.addresses)
        return True

    def _writes_first_gradients(self, tensors: TensorList) -> bool:
        """Whether h or a copy of w take the memory of g1."""
        key = tensors.key
        return key.rule == BaseRule.NONE or (key.has_backup and self._reuse_first_gradient)

    def perturb(self) -> None:
        """Form the norm of the gradients at w and move to the ascent point."""
        self._reduce(0)
        self.pending = True
        for tensors, backend in self._with_backends():
            if tensors.key.has_backup:
                tensors.make_backups(self._reuse_first_gradient)
            backend.perturb(tensors)

    def update(self, rows: list[GroupRow], rates: list[Tensor | None], evaluations: int) -> None:
        """Take the gradients at the ascent point, restore w and update it."""
        for tensors, backend in self._with_backends():
            # The rule `none` writes h and d over the gradients.
            gradients = tensors.reader.read(writes=tensors.key.rule == BaseRule.NONE)
            check_not_overwritten(tensors.params, tensors.first_addresses, gradients.addresses)
            if gradients.moved:
                self._follow_storage(tensors, same_layout=True)
            tensors.grads[1] = gradients.tensors
            backend.bind(tensors, 1, gradients.addresses)
            if gradients.dtype != tensors.grad_dtype:
                self._widen_gradients(tensors)
        self.set_rows(_with_the_perturbation_of(self.primary.rows, rows), rates)
        if self._check_second:
            self._reduce(1)
        first = True
        for tensors, backend in self._with_backends():
            backend.update(
                tensors,
                tensors.key.rule,
                evaluations,
                check_second=self._check_second,
                count_skipped=first,
            )
            first = False
        if self._foreign is not None:
            self._step_foreign(rows, rates, evaluations)
        self._finish()

    def _widen_gradients(self, tensors: TensorList) -> None:
        """Give the gradients of two evaluations that came in two dtypes the parameters' dtype."""
        dtype = tensors.key.dtype
        wide = []  # all that can fail comes before anything changes
        for evaluation in range(2):
            pairs = zip(tensors.params, tensors.grads[evaluation], strict=True)
            grads = [walkable(param, grad, dtype) for param, grad in pairs]
            wide.append((grads, addresses_of(grads)))
        tensors.grad_dtype = dtype
        for evaluation, (grads, addresses) in enumerate(wide):
            tensors.grads[evaluation] = grads
            BACKENDS[tensors.key.backend].bind(tensors, evaluation, addresses)

    def _step_foreign(
        self, rows: list[GroupRow], rates: list[Tensor | None], evaluations: int
    ) -> None:
        """Step the base optimizer with h, then subtract lr * d; the rule `none` left h and d."""
        assert self._foreign is not None
        params = [param for tensors in self.lists for param in tensors.params]
        h = [
            grad if tensors.has_all(i, evaluations) else None
            for tensors in self.lists
            for i, grad in enumerate(tensors.grads[0])
        ]
        with gradients_for_step(params, h):
            # The one place that waits for the device: a foreign step cannot be skipped on it.
            if not bool(torch.isfinite(self.primary.scalars[: Slot.SKIPPED]).all()):
                return
            self._foreign.step()
        if not any(any(row.d) for row in rows):
            return
        plain = {"sign": 1.0, "h1": 0.0, "h2": 1.0, "h3": 0.0, "d1": 0.0, "d2": 0.0, "d3": 0.0}
        self.set_rows([row._replace(**plain, max_norm=-1.0) for row in rows], rates)
        for tensors, backend in self._with_backends():
            if tensors.reader.moved():  # some optimizers rebind `.data`
                self._follow_storage(tensors, same_layout=True)
            backend.update(
                tensors,
                BaseRule.SGD,
                evaluations,
                check_second=self._check_second,
                count_skipped=False,
            )

    def abandon(self) -> None:
        """Put the weights back if they are perturbed, and forget the step."""
        try:
            if self.pending:
                for tensors, backend in self._with_backends():
                    if tensors.key.has_backup and tensors.backups is None:
                        continue  # it failed before this list was perturbed
                    if tensors.reader.moved():
                        self._follow_storage(tensors, same_layout=False)
                    backend.perturb(tensors, undo=True)
        finally:
            self._finish()

    def _finish(self) -> None:
        self.pending = False
        for tensors in self.lists:
            tensors.release()

    def _reduce(self, evaluation: int) -> None:
        begun = set()
        for tensors, backend in self._with_backends():
            backend.reduce(tensors, evaluation, accumulate=tensors.key.device in begun)
            begun.add(tensors.key.device)
        if len(self._shared) > 1:  # the norm is over all devices
            used = slice(0, 2) if evaluation == 0 else slice(2, 3)
            home = self.primary.scalars.device
            total = sum(shared.scalars[used].to(home) for shared in self._shared.values())
            for shared in self._shared.values():
                shared.scalars[used].copy_(total)  # type: ignore[arg-type]

    def _follow_storage(self, tensors: TensorList, *, same_layout: bool) -> None:
        stale = self.stale or tensors.reader.layouts() != tensors.reader.noted_layouts
        self.stale = True  # should it fail
        follow_storage(tensors, same_layout=same_layout)
        self.stale = stale
        BACKENDS[tensors.key.backend].refresh(tensors)

    def _with_backends(self) -> Iterator[tuple[TensorList, Backend]]:
        for tensors in self.lists:
            yield tensors, BACKENDS[tensors.key.backend]


def _updates_so_far(rule: BaseRule, entry: Mapping[str, Any], known: float | None) -> float:
    """How often a parameter has been updated; for momentum it matters only whether at all."""
    if rule.keeps_step:
        return float(entry.get("step", 0.0))
    if rule == BaseRule.MOMENTUM and entry.get("momentum_buffer") is not None:
        return 1.0 if known is None else known
    return 0.0


def _give_back(taken: Sequence[tuple[TensorList, Gradients]]) -> None:
    for tensors, gradients in taken:
        tensors.reader.give_back(gradients.tensors)


def _with_the_perturbation_of(before: list[GroupRow], rows: list[GroupRow]) -> list[GroupRow]:
    """Return ``rows`` with the radius that the weights were perturbed with: the restore needs it.

    Raises:
        RuntimeError: ``maximize`` was changed meanwhile.
    """
    if [row.sign for row in rows] != [row.sign for row in before]:
        raise RuntimeError("maximize was changed while the weights are perturbed")
    return [row._replace(rho=old.rho) for row, old in zip(rows, before, strict=True)]
