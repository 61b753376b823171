"""The tensor lists of an optimizer: which there are, and whether they still fit its groups."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from wsam_fused.backends import BACKENDS, Backend, Choice, select
from wsam_fused.base_rules import BaseRule
from wsam_fused.buckets import Member, in_buckets
from wsam_fused.distributed import like, local_of, shard_index, sharding_of
from wsam_fused.method_keys import STEP
from wsam_fused.parameters import check_separate, is_dense
from wsam_fused.plan import Geometry, GroupRow, PointerTable
from wsam_fused.precision import LOW_PRECISION, MASTER_KEY, Precision
from wsam_fused.shared_scalars import SharedScalars
from wsam_fused.sums_over_ranks import SumsOverRanks
from wsam_fused.tensor_list import ListKey, TensorList, state_tensor


class GroupKind(NamedTuple):
    """What of a parameter group decides which kernels run for it.

    Attributes:
        rule: The base rule.
        geometry: The metric of the perturbation.
        wants_backup: Whether copies of w are asked for.
        euclidean: Positions of parameters whose metric is 1 whatever the geometry is.
    """

    rule: BaseRule
    geometry: Geometry
    wants_backup: bool
    euclidean: frozenset[int] = frozenset()


class TensorLists:
    """The parameters of an optimizer in lists that are stepped together.

    Args:
        param_groups: The optimizer's groups. Parameters that are frozen and have no gradient are
            left out until they get one.
        kinds: One per group.
        state: The optimizer's state; missing entries are created, existing ones adopted.
        backend: ``"auto"`` or the name of a backend.
        foreign: Whether a base optimizer keeps a state of its own.
        step_counts: Updates that parameters have had, where the state does not say.
        precision: How 16-bit parameters are kept.
        bucketed: Whether parameters that could be stepped together are in several lists, to be
            updated one by one.

    Attributes:
        lists: The lists.
        list_of: The list that a parameter is in.
        shared: What the lists of one device have in common.
        primary: Those of the first device, which count skipped steps.
        choices: The backend of every parameter.
        over_ranks: Sums over ranks, for parameters that are DTensors; else None.
        stale: Whether the lists have to be made anew.

    Raises:
        ValueError: Two parameters share memory, or a state does not fit its parameter.
    """

    def __init__(
        self,
        param_groups: Sequence[Mapping[str, Any]],
        kinds: Sequence[GroupKind],
        state: MutableMapping[Tensor, Any],
        *,
        backend: str,
        foreign: bool,
        step_counts: Mapping[Tensor, float],
        precision: Precision,
        bucketed: bool = False,
    ) -> None:
        self._precision = precision
        self.choices: dict[Tensor, Choice] = {}
        self._kinds = list(kinds)
        self._state = state
        self._foreign = foreign
        self._left_out: list[Tensor] = []
        self._steps_of = [int(group.get(STEP, 0)) for group in param_groups]
        members: dict[ListKey, list[Member]] = defaultdict(list)
        number = 0
        count = sum(len(group["params"]) for group in param_groups)
        for index, (group, kind) in enumerate(zip(param_groups, kinds, strict=True)):
            for position, param in enumerate(group["params"]):
                if param.requires_grad or param.grad is not None:
                    key = self._key_of(param, kind, backend, position in kind.euclidean)
                    # Noise is drawn by number; parts of one parameter must not get the same.
                    members[key].append((param, index, number + count * shard_index(param)))
                else:
                    self._left_out.append(param)
                number += 1
        check_separate(local_of(param) for list_ in members.values() for param, _, _ in list_)
        if bucketed:
            members = in_buckets(members)
        devices = dict.fromkeys(key.device for key in members) or [torch.device("cpu")]
        self.shared = {device: SharedScalars(device) for device in devices}
        self.primary = next(iter(self.shared.values()))
        self.over_ranks = SumsOverRanks.of(p for group in param_groups for p in group["params"])
        self.lists = [self._new_list(key, list_, step_counts) for key, list_ in members.items()]
        self.list_of = {param: tensors for tensors in self.lists for param in tensors.owners}
        self._state_size = len(state)
        self.stale = False

    def _key_of(self, param: Tensor, kind: GroupKind, backend: str, euclidean: bool) -> ListKey:
        local = local_of(param)
        walkable = local.numel() > 0 and is_dense(local)
        choice = select(backend, local.device, param.dtype, walkable=walkable)
        self.choices[param] = choice
        geometry = Geometry.EUCLIDEAN if euclidean else kind.geometry
        has_backup = (
            kind.wants_backup or geometry != Geometry.EUCLIDEAN or param.dtype in LOW_PRECISION
        )
        return ListKey(
            local.device,
            param.dtype,
            choice.name,
            kind.rule,
            geometry,
            has_backup,
            self._precision.state_dtype(param.dtype),
            self._precision.keeps_master(param.dtype),
            sharding_of(param),
        )

    def _new_list(
        self,
        key: ListKey,
        members: list[Member],
        step_counts: Mapping[Tensor, float],
    ) -> TensorList:
        params = [param for param, _, _ in members]
        rule = key.rule
        entries = [self._state.get(param) or {} for param in params]
        counts = [
            _updates_so_far(rule, entry, step_counts.get(param), self._steps_of[index])
            for (param, index, _), entry in zip(members, entries, strict=True)
        ]
        steps = torch.tensor(counts, dtype=torch.float32, device=key.device)
        states = [
            [
                state_tensor(p, e.get(name), name, key.state_dtype)
                for p, e in zip(params, entries, strict=True)
            ]
            for name in rule.state_keys
        ]
        masters = None
        if key.has_master:
            masters = [
                state_tensor(
                    p, e.get(MASTER_KEY), MASTER_KEY, torch.float32, initial=local_of(p).detach()
                )
                for p, e in zip(params, entries, strict=True)
            ]
        for i, param in enumerate(params):  # every tensor is good: now the state may change
            if rule.keeps_step:
                self._state[param]["step"] = steps[i]
            for name, tensors in zip(rule.state_keys, states, strict=True):
                self._state[param][name] = like(param, tensors[i])
            if masters is not None:
                self._state[param][MASTER_KEY] = like(param, masters[i])
            elif MASTER_KEY in entries[i]:
                del self._state[param][MASTER_KEY]
        # The rule `none` writes to the gradients what the foreign optimizer reads.
        lower = BACKENDS[key.backend].GRADIENT_DTYPES.get(key.dtype, ())
        return TensorList(
            key,
            [local_of(param) for param in params],
            owners=params,
            groups=[index for _, index, _ in members],
            keys=[number for _, _, number in members],
            shared=self.shared[key.device],
            states=states,
            steps=steps,
            grad_dtypes=() if rule == BaseRule.NONE else lower,
            masters=masters,
            rounding_seed=self._precision.rounding_seed(key.dtype, rule),
        )

    # ---- are they still right? ---------------------------------------------------------------

    def outdated(self, kinds: Sequence[GroupKind], state: MutableMapping[Tensor, Any]) -> bool:
        """Whether the lists do not fit the groups any more and have to be made anew.

        Parameters whose memory was exchanged are noticed later, when the gradients are read.
        """
        return (
            self.stale
            or kinds != self._kinds
            or state is not self._state
            or self._lost_state()
            or any(param.grad is not None for param in self._left_out)
        )

    def _lost_state(self) -> bool:
        """Whether entries that the kernels write to are gone; others come and go as they like."""
        if self._foreign or len(self._state) == self._state_size:
            return False
        self._state_size = len(self._state)
        return any(
            param not in self._state
            for tensors in self.lists
            if tensors.key.rule.state_keys or tensors.key.has_master
            for param in tensors.owners
        )

    def is_captured(self) -> bool:
        """Whether the replays of a CUDA graph write to the tables, which then have to stay."""
        tables = [tensors.table for tensors in self.lists if tensors.table is not None]
        owners: list[SharedScalars | PointerTable] = [*self.shared.values(), *tables]
        return any(owner.is_captured() for owner in owners)

    def step_counts(self) -> dict[Tensor, float]:
        """Updates that each parameter has had."""
        return {
            param: count
            for tensors in self.lists
            for param, count in zip(tensors.owners, tensors.steps.tolist(), strict=True)
        }

    # ---- all of them -------------------------------------------------------------------------

    def __iter__(self) -> Iterator[tuple[TensorList, Backend]]:
        """Yield every list with its backend; not those that are through with the step."""
        for tensors in self.lists:
            if not tensors.updated:
                yield tensors, BACKENDS[tensors.key.backend]

    def set_rows(self, rows: list[GroupRow]) -> None:
        """Bring the coefficients and hyper-parameters of the groups up to date, one row each."""
        for shared in self.shared.values():
            shared.set_rows(rows)

    def clear(self, slots: Sequence[slice]) -> None:
        """Set sums to 0 on every device."""
        for shared in self.shared.values():
            for each in slots:
                shared.scalars[each].zero_()

    def sum_over_devices(self, slots: slice) -> None:
        """Give every device the sum over all of them."""
        if len(self.shared) == 1:
            return
        home = self.primary.scalars.device
        total = sum(shared.scalars[slots].to(home) for shared in self.shared.values())
        for shared in self.shared.values():
            shared.scalars[slots].copy_(total)  # type: ignore[arg-type]


def _updates_so_far(
    rule: BaseRule, entry: Mapping[str, Any], known: float | None, steps: int
) -> float:
    """How often a parameter has been updated.

    Where torch keeps no count it decides whether there is momentum, and which chance rounding
    takes. A checkpoint then knows only the steps of the group; skipped ones count among them.

    Args:
        rule: The base rule.
        entry: The state of the parameter.
        known: The count, if it is known.
        steps: Of the group.
    """
    if rule.keeps_step:
        return float(entry.get("step", 0.0))
    if rule == BaseRule.MOMENTUM and entry.get("momentum_buffer") is None:
        return 0.0
    if known is not None:
        return known
    return float(max(steps, 1)) if rule == BaseRule.MOMENTUM else float(steps)
