"""What all methods share but the step: parameter groups, tables, checkpoints."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from wsam_fused import backends, checkpoints
from wsam_fused.arguments import choice, number, whole_number
from wsam_fused.base_rules import BaseRule, check_base, rule_of
from wsam_fused.bases import BaseOptimizer, resolve
from wsam_fused.checkpoint_checks import check_fits, check_group_values, check_states
from wsam_fused.checkpoint_form import check_form
from wsam_fused.distributed import check_distributed, local_of
from wsam_fused.engine import StepEngine
from wsam_fused.gathered_weights import GatheredWeights
from wsam_fused.groups import check_values, group_row
from wsam_fused.in_backward import InBackwardUpdate
from wsam_fused.kept_memory import KeptSums
from wsam_fused.method_keys import (
    GEOMETRIES,
    METHOD,
    STEP,
    MethodKeys,
    geometry_of,
    without_weight,
)
from wsam_fused.model_state import FrozenBatchNorm
from wsam_fused.parameters import check_params, check_separate
from wsam_fused.plan import GroupRow, Slot
from wsam_fused.precision import Precision
from wsam_fused.random_state import Replay
from wsam_fused.replicas import Replicas
from wsam_fused.row import Row
from wsam_fused.telemetry import LastStep
from wsam_fused.tensor_lists import GroupKind, TensorLists
from wsam_fused.tracing import keep_untraced
from wsam_fused.zero_redundancy import check_not_inside, is_zero_redundancy

# What __getstate__ of torch.optim.Optimizer leaves out, and a copy of this optimizer needs.
_OWN_ATTRIBUTES = (
    "_rule_class",
    "_base",
    "_method_keys",
    "_eps",
    "_max_norm",
    "_check_all",
    "_restore",
    "_precision",
    "_only_weights",
    "_every",
    "_backend",
    "_batch_norm",
    "_replay_rng",
    "_replicas",
)


class MethodOptimizer(Optimizer):
    """Owns the groups and the state of a base optimizer, and the tables of its parameters.

    Groups and state have the keys of ``torch.optim``, so learning rate schedulers work on it and
    checkpoints of the base optimizer load into it and back.
    """

    # Whether the update still needs g1 (apart from recomputing w); if not, a backup of w may take
    # its memory.
    uses_first_gradient: ClassVar[bool] = True
    # Which of the method's hyper-parameters may be schedules.
    scheduled: ClassVar[tuple[str, ...]] = ("rho",)
    # The handle while parameters are updated within the backward; a copy has none.
    _in_backward: InBackwardUpdate | None = None

    def __init__(
        self,
        params: Iterable[Any],
        base_optimizer: BaseOptimizer,
        own: dict[str, Any],
        *,
        geometry: str | None = None,
        eta: float | None = None,
        adaptive: bool = False,
        only_weights: bool = False,
        every: int = 1,
        eps: float = 1e-12,
        max_grad_norm: float | None = None,
        check_finite: bool = False,
        restore: str = "recompute",
        master_weights: bool = False,
        state_dtype: str = "float32",
        stochastic_rounding: bool = False,
        backend: str = "auto",
        model: nn.Module | None = None,
        replay_rng: bool = False,
        perturb_scope: str = "global",
        process_group: dist.ProcessGroup | None = None,
        **base_kwargs: Any,
    ) -> None:
        """Validate everything and take over the base optimizer's groups and state.

        ``own`` has the values of the method's group keys; for the other arguments see
        :mod:`wsam_fused.documentation`, whose text the methods show.
        """
        check_not_inside(type(self).__name__)
        self._max_norm = -1.0
        if max_grad_norm is not None:
            self._max_norm = number("max_grad_norm", max_grad_norm, 0.0, low_included=False)
        self._eps = number("eps", eps, 0.0)
        self._check_all = bool(check_finite) or self._max_norm > 0
        self._restore = choice("restore", restore, ("recompute", "backup"))
        self._precision = Precision.of(master_weights, state_dtype, stochastic_rounding)
        self._only_weights = bool(only_weights)
        self._every = whole_number("every", every, 1)
        self._backend = choice("backend", backend, backends.names())
        self._batch_norm = FrozenBatchNorm(model)
        self._replay_rng = bool(replay_rng)
        self._replay = Replay()
        self._replicas = Replicas(perturb_scope, process_group, model)
        own = {**own, **geometry_of(geometry, eta, adaptive=bool(adaptive))}
        base, self._rule_class = resolve(params, base_optimizer, base_kwargs)
        self._method_keys = MethodKeys(own, self.scheduled, base.defaults)
        self._engine: StepEngine | None = None
        # Used only by the replays of CUDA graphs, which write to their memory.
        self._captured_engines: list[StepEngine] = []
        self._kept_sums = (KeptSums(), KeptSums())
        self._checked_rows: list[GroupRow] = []
        self._gathered = GatheredWeights()
        self._carried_counts: dict[Tensor, float] = {}
        self.last = LastStep()
        defaults = {**self._method_keys.defaults(), METHOD: self._method_name()}
        super().__init__(base.param_groups, {**base.defaults, **defaults})
        keep_untraced(type(self))
        self._adopt(base)

    def _adopt(self, base: Optimizer) -> None:
        """Share groups and state with a base optimizer, so that a scheduler on either is seen."""
        self.state = base.state
        base.param_groups[:] = self.param_groups
        self.param_groups = base.param_groups
        self._base = base

    def row(self, group: dict[str, Any]) -> Row:
        """Return the coefficients of the method for one parameter group."""
        raise NotImplementedError

    @classmethod
    def _check_own(cls, own: dict[str, Any]) -> None:
        """Validate values of the method's group keys; subclasses add theirs."""
        number("rho", own["rho"], 0.0)
        number("eta", own["eta"], 0.0)
        choice("geometry", own["geometry"], tuple(GEOMETRIES))

    # ---- groups ------------------------------------------------------------------------------

    def own(self, group: dict[str, Any], key: str) -> Any:
        """Read one of the method's keys from a group, whatever it is called there."""
        return self._method_keys.read(group, key)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group; see ``torch.optim.Optimizer.add_param_group``.

        Raises:
            RuntimeError: The weights are perturbed.
            TypeError: A parameter is complex.
            ValueError: A value is out of range, or a parameter comes twice or shares memory.
        """
        self._require_idle("add_param_group()")
        self._method_keys.spell_out(param_group)
        if self.param_groups:  # it counts with the others
            param_group.setdefault(STEP, self._steps())
        super().add_param_group(param_group)
        try:
            self._check_group(self.param_groups[-1])
        except BaseException:
            self.param_groups.pop()
            self._method_keys.forget_last_group()
            raise
        if self._engine is not None:
            self._engine.lists.stale = True

    def _check_group(self, group: dict[str, Any]) -> None:
        self._method_keys.take_schedules(group)
        self._check_values(group)
        check_distributed(self.param_groups)
        self._replicas.check_params(group["params"])
        check_params(list(map(local_of, group["params"])))
        check_separate(local_of(param) for one in self.param_groups for param in one["params"])
        self._gathered.find(group["params"])
        if self._only_weights:
            without_weight(group)
        for param in group["params"]:
            backends.select(self._backend, local_of(param).device, param.dtype)
            self._precision.check(param, has_fused_update=self._rule_class is not None)

    def _check_values(self, group: dict[str, Any]) -> None:
        self._check_own(self._method_keys.values(group))
        check_values(group)
        if self._rule_class is not None:
            check_base(self._rule_class, group)

    # ---- what can be asked -------------------------------------------------------------------

    @property
    def is_perturbed(self) -> bool:
        """Whether a step is in progress: the weights are perturbed, or about to be updated."""
        return self._engine is not None and self._engine.pending

    @property
    def skipped_steps(self) -> Tensor:
        """Steps skipped because a gradient norm was not finite; float64 scalar on the device."""
        return self._current_engine().scalars[Slot.SKIPPED].clone()

    def backend_of(self, param: Tensor) -> str:
        """Name of the backend that steps ``param``, and why it was chosen."""
        chosen = self._current_engine().lists.choices.get(param)
        return "none: it has no gradient" if chosen is None else f"{chosen.name}: {chosen.reason}"

    # ---- checkpoints -------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the state under the keys of the base optimizer; nothing of a step's scratch.

        Raises:
            RuntimeError: The weights are perturbed.
        """
        self._require_idle("state_dict()")
        if is_zero_redundancy(self._base):  # its state is on all ranks; consolidate_state_dict()
            return checkpoints.with_plain_numbers(self._base.state_dict())
        packed = checkpoints.with_plain_numbers(super().state_dict())
        if self._rule_class is not None:
            checkpoints.without_unused_buffers(packed, self.param_groups, self._step_counts())
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of this optimizer or of its base optimizer.

        Group entries that the checkpoint lacks (``rho`` in one of the base optimizer) keep their
        current values.

        Raises:
            RuntimeError: The weights are perturbed.
            TypeError: It has not the form of a checkpoint, or a value is of another type.
            ValueError: It is of another method or base optimizer, groups, shapes or dtypes do not
                match, or a value is out of range. Nothing has changed if it is refused.
        """
        self._require_idle("load_state_dict()")
        foreign = self._rule_class is None
        check_form(state_dict, groups=len(self.param_groups), takes_others=foreign)
        check_fits(state_dict, self, self._base)
        state_dict = checkpoints.with_missing_keys(state_dict, self.param_groups)
        check_group_values(state_dict["param_groups"], self._check_values)
        if self._rule_class is not None:
            check_states(state_dict, self.param_groups, partial(rule_of, self._rule_class))
        if is_zero_redundancy(self._base):
            self._base.load_state_dict({**state_dict, "state": dict(state_dict["state"])})
            self.__setstate__({"state": self._base.state, "param_groups": self._base.param_groups})
            return
        with checkpoints.all_or_nothing(self):
            super().load_state_dict(state_dict)
            if self._rule_class is not None:
                checkpoints.keep_wide_states(self, state_dict, self._precision)

    def __getstate__(self) -> dict[str, Any]:
        self._require_idle("pickling or copying the optimizer")
        own = {name: getattr(self, name) for name in _OWN_ATTRIBUTES}
        return {**super().__getstate__(), **own, "_carried_counts": self._step_counts()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._carried_counts = {}  # load_state_dict() brings a state that says it all
        self._keep_captured()
        super().__setstate__(state)
        keep_untraced(type(self))
        self._engine = None
        self._kept_sums = (KeptSums(), KeptSums())
        self._checked_rows = []
        self._replay = Replay()
        self.__dict__.setdefault("_gathered", GatheredWeights())
        self.last = LastStep()
        if self._base is not None:  # load_state_dict() made new groups and a new state
            self._base.param_groups = self.param_groups
            self._base.state = self.state

    # ---- private -----------------------------------------------------------------------------

    @classmethod
    def _method_name(cls) -> str:
        """Name of the method in checkpoints; a user's subclass has that of its base."""
        return next(c.__name__ for c in cls.__mro__ if c.__module__.startswith("wsam_fused."))

    def _steps(self) -> int:
        """How many steps have been made."""
        return int(self.param_groups[0][STEP])

    def _step_counts(self) -> dict[Tensor, float]:
        return self._carried_counts if self._engine is None else self._engine.lists.step_counts()

    def _require_idle(self, what: str) -> None:
        if getattr(self, "_engine", None) is not None and self.is_perturbed:
            raise RuntimeError(
                f"{what} was called while the weights are perturbed; "
                "call second_step() or restore() before"
            )

    def _current_engine(self) -> StepEngine:
        """Return the engine for the groups as they are now."""
        engine = self._engine
        if engine is not None and engine.pending:  # the tables of a step in progress stay
            return engine
        if engine is None or engine.lists.outdated(self._kinds(), self.state):
            return self._new_engine()
        engine.lists.set_rows(self._rows(self._method_rows()))
        return engine

    def _new_engine(self) -> StepEngine:
        in_use = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        if in_use and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "the optimizer has to set up its tables, which a CUDA graph cannot capture; make "
                "a whole step before the capture, with gradients for the same parameters"
            )
        rows = self._rows(self._method_rows())  # a wrong value is found before there is new state
        foreign = self._base if self._rule_class is None else None
        lists = TensorLists(
            self.param_groups,
            self._kinds(),
            self.state,
            backend=self._backend,
            foreign=foreign is not None,
            step_counts=self._step_counts(),
            precision=self._precision,
            bucketed=self._in_backward is not None,
        )
        engine = StepEngine(
            lists,
            check_all=self._check_all,
            reuse_first_gradient=not self.uses_first_gradient,
            foreign=foreign,
            gathered=self._gathered,
        )
        if self._engine is not None:
            engine.scalars.copy_(self._engine.scalars)
        self._keep_captured()
        if self._in_backward is not None:
            self._in_backward.attach(lists.list_of)
        lists.set_rows(rows)
        self._engine = engine
        return engine

    def _keep_captured(self) -> None:
        """Keep an engine that is about to be replaced, if a CUDA graph uses its memory."""
        kept: list[StepEngine] = self.__dict__.setdefault("_captured_engines", [])
        engine: StepEngine | None = self.__dict__.get("_engine")
        if engine is not None and engine.lists.is_captured():
            kept.append(engine)

    def _kinds(self) -> list[GroupKind]:
        return [self._kind(group) for group in self.param_groups]

    def _kind(self, group: dict[str, Any]) -> GroupKind:
        rule = BaseRule.NONE if self._rule_class is None else rule_of(self._rule_class, group)
        geometry = GEOMETRIES[choice("geometry", self.own(group, "geometry"), tuple(GEOMETRIES))]
        euclidean = without_weight(group) if self._only_weights else frozenset()
        wants_backup = self._restore == "backup" or self._replicas.perturb_apart
        return GroupKind(rule, geometry, wants_backup, euclidean)

    def _method_rows(self) -> list[Row]:
        return [self.row(group) for group in self.param_groups]

    def _places(self, group: dict[str, Any]) -> dict[str, Any]:
        """Return the hyper-parameters that say where the points of a step are."""
        return self._method_keys.values(group)

    def _rows(self, method: list[Row]) -> list[GroupRow]:
        rows = [
            group_row(
                group,
                self._kind(group).rule,
                row,
                self._places(group),
                self._eps,
                self._max_norm,
            )
            for group, row in zip(self.param_groups, method, strict=True)
        ]
        if rows != self._checked_rows:  # a scheduler or the user changed something
            for group in self.param_groups:
                self._check_values(group)
            self._checked_rows = rows
        return rows
