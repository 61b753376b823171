"""The optimizer that all methods share: groups, phases, closures, checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from wsam_fused import backends
from wsam_fused.arguments import choice, number
from wsam_fused.base_rules import BaseRule, device_learning_rate, rule_of
from wsam_fused.bases import BaseOptimizer, resolve
from wsam_fused.checkpoints import keep_wide_states
from wsam_fused.engine import GroupKind, StepEngine
from wsam_fused.groups import check_values, group_row
from wsam_fused.model_state import FrozenBatchNorm
from wsam_fused.parameters import check_params, check_separate
from wsam_fused.plan import Geometry, GroupRow, Slot
from wsam_fused.row import Row
from wsam_fused.telemetry import LastStep

Closure = Callable[[], Any]

# What __getstate__ of torch.optim.Optimizer leaves out, and a copy of this optimizer needs.
_OWN_ATTRIBUTES = (
    "_rule_class",
    "_base",
    "_keys",
    "_eps",
    "_max_norm",
    "_check_second",
    "_restore",
    "_backend",
    "_batch_norm",
)


class SharpnessAwareOptimizer(Optimizer):
    """Base class: everything but the row of coefficients.

    A step evaluates the gradient at w and at a perturbed neighbour, then restores w and updates it
    with the combination that the method's :class:`~wsam_fused.row.Row` states. Subclasses define
    :meth:`row`.

    The optimizer owns the base optimizer's groups and state, under the keys of ``torch.optim``, so
    learning rate schedulers work on it and checkpoints of the base optimizer load into it and back.
    """

    # Whether the update still needs g1 (apart from recomputing w); if not, a backup of w may take
    # its memory.
    uses_first_gradient: ClassVar[bool] = True

    def __init__(
        self,
        params: Iterable[Any],
        base_optimizer: BaseOptimizer,
        own: dict[str, Any],
        *,
        adaptive: bool = False,
        eps: float = 1e-12,
        max_grad_norm: float | None = None,
        check_finite: bool = False,
        restore: str = "recompute",
        backend: str = "auto",
        model: nn.Module | None = None,
        **base_kwargs: Any,
    ) -> None:
        """Validate everything and take over the base optimizer's groups and state.

        ``own`` has the values of the method's group keys; for the other arguments see
        :mod:`wsam_fused.documentation`, whose text the methods show.
        """
        self._max_norm = -1.0
        if max_grad_norm is not None:
            self._max_norm = number("max_grad_norm", max_grad_norm, 0.0, low_included=False)
        self._eps = number("eps", eps, 0.0)
        self._check_second = bool(check_finite) or self._max_norm > 0
        self._restore = choice("restore", restore, ("recompute", "backup"))
        self._backend = choice("backend", backend, backends.names())
        self._batch_norm = FrozenBatchNorm(model)
        own = {**own, "adaptive": bool(adaptive)}
        self._check_own(own)
        base, self._rule_class = resolve(params, base_optimizer, base_kwargs)
        # A foreign base reads keys of its own; where one is called like ours, ours is prefixed.
        self._keys = {key: f"sam_{key}" if key in base.defaults else key for key in own}
        self._engine: StepEngine | None = None
        # Used only by the replays of CUDA graphs, which write to their memory.
        self._captured_engines: list[StepEngine] = []
        self._checked_rows: list[GroupRow] = []
        self._carried_counts: dict[Tensor, float] = {}
        self.last = LastStep()
        defaults = {**base.defaults, **{self._keys[key]: value for key, value in own.items()}}
        super().__init__(base.param_groups, defaults)
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

    # ---- groups ------------------------------------------------------------------------------

    def own(self, group: dict[str, Any], key: str) -> Any:
        """Read one of the method's keys from a group, whatever it is called there."""
        return group[self._keys[key]]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group; see ``torch.optim.Optimizer.add_param_group``.

        Raises:
            RuntimeError: The weights are perturbed.
            TypeError: A parameter is complex.
            ValueError: A value is out of range, or a parameter comes twice or shares memory.
        """
        self._require_idle("add_param_group()")
        super().add_param_group(param_group)
        try:
            self._check_group(self.param_groups[-1])
        except BaseException:
            self.param_groups.pop()
            raise
        if self._engine is not None:
            self._engine.stale = True

    def _check_values(self, group: dict[str, Any]) -> None:
        self._check_own({key: self.own(group, key) for key in self._keys})
        check_values(group)

    def _check_group(self, group: dict[str, Any]) -> None:
        self._check_values(group)
        check_params(group["params"])
        check_separate(param for one in self.param_groups for param in one["params"])
        for param in group["params"]:
            backends.select(self._backend, param.device, param.dtype)

    # ---- the step ----------------------------------------------------------------------------

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        """Perturb the weights by the gradients in ``.grad``.

        Args:
            zero_grad: Take the gradients out of ``.grad`` (they live on inside the optimizer, no
                copy is made). With False ``.grad`` stays as it is, which costs a copy; clear it
                before the next backward, or that adds to it.

        Raises:
            RuntimeError: No parameter has a gradient, or the weights are perturbed already.
            TypeError: A gradient is sparse or complex.
        """
        self._require_idle("first_step()")
        engine = self._current_engine()
        while not engine.read_first(keep=not zero_grad):
            engine = self._new_engine()
        try:
            engine.perturb()
            self._batch_norm.save()
        except BaseException:
            engine.abandon()
            raise

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        """Restore the weights and update them with both gradients.

        A parameter that got a gradient in only one of the two evaluations is restored and not
        updated; one without any is left alone, as in ``torch.optim``.

        Args:
            zero_grad: Set ``.grad`` to None afterwards.

        Raises:
            RuntimeError: ``first_step`` has not been called.
            TypeError: A gradient is sparse or complex; the weights are restored.
        """
        if not self.is_perturbed:
            raise RuntimeError("second_step() was called before first_step()")
        engine = self._engine
        assert engine is not None  # is_perturbed says so
        try:
            self._batch_norm.restore()
            rates = [device_learning_rate(group) for group in self.param_groups]
            engine.update(self._rows(), rates, self.row(self.param_groups[0]).evaluations)
        except BaseException:
            engine.abandon()
            raise
        self.last.sums = engine.primary.scalars
        self.last.set_losses(None, None)
        self._opt_called = True  # lr_scheduler looks for it
        if zero_grad:
            self.zero_grad()

    def step(self, closure: Closure | None = None) -> Any:
        """Perform one whole step, or complete one that ``first_step`` began.

        Args:
            closure: Clears the gradients, computes the loss, calls ``backward`` and returns the
                loss; it is evaluated twice. Gradients left over from before are cleared first.
                Without it, a backward must have followed ``first_step()``.

        Returns:
            The closure's loss at the unperturbed weights; None without a closure.

        Raises:
            RuntimeError: There is no closure and nothing to complete.

        If the closure raises, the weights are restored and the state is untouched.
        """
        if closure is None:
            if not self.is_perturbed:
                raise RuntimeError(
                    "step() without a closure completes a step that first_step() began, but "
                    "nothing is pending; call step(closure), or first_step() and backward() before"
                )
            self.second_step()
            return None
        self._require_idle("step(closure)")
        self.zero_grad()
        try:
            with torch.enable_grad():
                loss = closure()
            self.first_step(zero_grad=True)
            with torch.enable_grad():
                perturbed_loss = closure()
            self.second_step()
        except BaseException:
            self.restore()
            raise
        self.last.set_losses(loss, perturbed_loss)
        return loss

    @property
    def is_perturbed(self) -> bool:
        """Whether the weights are perturbed, that is, between first_step and second_step."""
        return self._engine is not None and self._engine.pending

    @torch.no_grad()
    def restore(self) -> None:
        """Put the weights back if they are perturbed and forget the step; else do nothing."""
        if self._engine is not None:
            self._batch_norm.restore()
            self._engine.abandon()

    @property
    def skipped_steps(self) -> Tensor:
        """Steps skipped because a gradient norm was not finite; float64 scalar on the device."""
        return self._current_engine().primary.scalars[Slot.SKIPPED].clone()

    def backend_of(self, param: Tensor) -> str:
        """Name of the backend that steps ``param``, and why it was chosen."""
        chosen = self._current_engine().choices.get(param)
        return "none: it has no gradient" if chosen is None else f"{chosen.name}: {chosen.reason}"

    # ---- checkpoints -------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the state under the keys of the base optimizer; nothing of a step's scratch.

        Raises:
            RuntimeError: The weights are perturbed.
        """
        self._require_idle("state_dict()")
        packed = super().state_dict()
        counts = self._carried_counts if self._engine is None else self._engine.step_counts()
        params = [param for group in self.param_groups for param in group["params"]]
        for position, param in enumerate(params):
            entry = packed["state"].get(position, {})
            if "momentum_buffer" in entry and not counts.get(param, 1.0):
                # torch tells by this that the next step is the first, which is not dampened.
                packed["state"][position] = {**entry, "momentum_buffer": None}
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of this optimizer or of its base optimizer.

        Group entries that the checkpoint lacks (``rho`` in one of the base optimizer) keep their
        current values.

        Raises:
            RuntimeError: The weights are perturbed.
            ValueError: Groups or shapes do not match.
        """
        self._require_idle("load_state_dict()")
        saved = state_dict["param_groups"]
        if len(saved) == len(self.param_groups):
            merged = [
                {**{k: v for k, v in now.items() if k != "params"}, **group}
                for now, group in zip(self.param_groups, saved, strict=True)
            ]
            state_dict = {**state_dict, "param_groups": merged}
        super().load_state_dict(state_dict)
        if self._rule_class is not None:
            keep_wide_states(self, state_dict)

    def __getstate__(self) -> dict[str, Any]:
        self._require_idle("pickling or copying the optimizer")
        own = {name: getattr(self, name) for name in _OWN_ATTRIBUTES}
        if self._engine is not None:
            own["_carried_counts"] = self._engine.step_counts()
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._carried_counts = {}  # load_state_dict() brings a state that says it all
        self._keep_captured()
        super().__setstate__(state)
        self._engine = None
        self._checked_rows = []
        self.last = LastStep()
        if self._base is not None:  # load_state_dict() made new groups and a new state
            self._base.param_groups = self.param_groups
            self._base.state = self.state

    # ---- private -----------------------------------------------------------------------------

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
        if engine is None or engine.outdated(self._kinds(), self.state):
            return self._new_engine()
        engine.set_rows(self._rows())
        return engine

    def _new_engine(self) -> StepEngine:
        in_use = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        if in_use and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "the optimizer has to set up its tables, which a CUDA graph cannot capture; make "
                "a whole step before the capture, with gradients for the same parameters"
            )
        old = self._engine
        engine = StepEngine(
            self.param_groups,
            self._kinds(),
            self.state,
            check_second=self._check_second,
            backend=self._backend,
            reuse_first_gradient=not self.uses_first_gradient,
            foreign=self._base if self._rule_class is None else None,
            step_counts=self._carried_counts if old is None else old.step_counts(),
        )
        if old is not None:
            engine.primary.scalars.copy_(old.primary.scalars)
        self._keep_captured()
        engine.set_rows(self._rows())
        self._engine = engine
        return engine

    def _keep_captured(self) -> None:
        """Keep an engine that is about to be replaced, if a CUDA graph uses its memory."""
        kept: list[StepEngine] = self.__dict__.setdefault("_captured_engines", [])
        engine: StepEngine | None = self.__dict__.get("_engine")
        if engine is not None and engine.is_captured():
            kept.append(engine)

    def _kinds(self) -> list[GroupKind]:
        return [self._kind(group) for group in self.param_groups]

    def _kind(self, group: dict[str, Any]) -> GroupKind:
        rule = BaseRule.NONE if self._rule_class is None else rule_of(self._rule_class, group)
        geometry = Geometry.ADAPTIVE if self.own(group, "adaptive") else Geometry.EUCLIDEAN
        return GroupKind(rule, geometry, self._restore == "backup")

    def _rows(self) -> list[GroupRow]:
        rows = [
            group_row(
                group,
                self._kind(group).rule,
                self.row(group),
                self.own(group, "rho"),
                self._eps,
                self._max_norm,
            )
            for group in self.param_groups
        ]
        if rows != self._checked_rows:  # a scheduler or the user changed something
            for group in self.param_groups:
                self._check_values(group)
            self._checked_rows = rows
        return rows
