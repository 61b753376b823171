"""Updates parameters within the backward of a step's last evaluation."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from wsam_fused.base_rules import device_learning_rate
from wsam_fused.engine import StepEngine
from wsam_fused.plan import Point
from wsam_fused.tensor_list import TensorList

if TYPE_CHECKING:
    from wsam_fused.optimizer import SharpnessAwareOptimizer

_WHAT = "update_in_backward()"
_TWICE = (
    "the gradient of a parameter of shape {shape} was completed twice in one evaluation, but "
    "update_in_backward() updates as soon as there is one; call backward() once an evaluation, on "
    "the sum of the losses, or remove() the handle and accumulate without it. What had not been "
    "updated by then has been restored"
)


class InBackwardUpdate:
    """The handle of :meth:`SharpnessAwareOptimizer.update_in_backward`.

    As a context manager it is removed at the end. The hooks on the parameters refer to it weakly,
    and it to its optimizer, so that neither is kept alive.

    Args:
        optimizer: Whose parameters are updated.

    Raises:
        RuntimeError: A step is in progress, the optimizer has a handle already, or gradients are
            averaged over processes after their hooks have run.
        TypeError: The method or the base optimizer needs all gradients at once.
        ValueError: An option does.
    """

    def __init__(self, optimizer: SharpnessAwareOptimizer) -> None:
        optimizer._require_idle(_WHAT)
        if optimizer._in_backward is not None:
            raise RuntimeError(f"{_WHAT} is active already; remove() its handle before")
        _refuse_what_needs_all_gradients(optimizer)
        _refuse_averages(optimizer)
        self._optimizer = weakref.ref(optimizer)
        self._hooks: dict[Tensor, RemovableHandle] = {}
        # Every GPU has a thread of the backward, and parameters may be on several.
        self._lock = threading.Lock()
        self._finalizer = weakref.finalize(optimizer, _remove, self._hooks)
        self._finalizer.atexit = False
        optimizer._in_backward = self
        _make_lists_anew(optimizer)

    @property
    def active(self) -> bool:
        """Whether parameters are updated within the backward."""
        optimizer = self._optimizer()
        return optimizer is not None and optimizer._in_backward is self

    def remove(self) -> None:
        """Update in ``second_step`` again; a step in progress completes there what it has not yet.

        A handle that is not active any more is left as it is.
        """
        self._finalizer()
        optimizer = self._optimizer()
        if optimizer is not None and optimizer._in_backward is self:
            optimizer._in_backward = None
            _make_lists_anew(optimizer)

    def __enter__(self) -> InBackwardUpdate:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()

    # ---- for the optimizer -------------------------------------------------------------------

    def attach(self, params: Iterable[Tensor]) -> None:
        """Hear of the gradients of ``params``, of which some may be new.

        One that does not require a gradient now is updated in ``second_step`` should it have one.
        """
        hook = _weak_hook(self)
        for param in params:
            if param.requires_grad and param not in self._hooks:
                self._hooks[param] = param.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]

    # ---- within a backward -------------------------------------------------------------------

    @torch.no_grad()
    def _gradient_is_complete(self, param: Tensor) -> None:
        """Update the list of a parameter if this was the last gradient that it waited for."""
        optimizer = self._optimizer()
        if optimizer is None:
            return
        with self._lock:
            engine = optimizer._engine
            if engine is None or engine.at != Point.ASCENT or engine.read != 1:
                return  # an earlier evaluation, or none of a step
            tensors = engine.lists.list_of.get(param)
            if tensors is None:
                return
            try:
                self._note(optimizer, engine, tensors, param)
            except BaseException:
                optimizer._undo_step()
                raise

    def _note(
        self,
        optimizer: SharpnessAwareOptimizer,
        engine: StepEngine,
        tensors: TensorList,
        param: Tensor,
    ) -> None:
        progress = engine.progress
        if param in progress.arrived:
            raise RuntimeError(_TWICE.format(shape=tuple(param.shape)))
        if not progress.arrived:
            _refuse_averages(optimizer)
        progress.arrived.add(param)
        if tensors.awaited is None and not tensors.updated:
            tensors.awaited = _awaited(tensors, optimizer.required)
        if not tensors.awaited or param not in tensors.awaited:
            param.grad = None  # without a first gradient it is not updated
            return
        tensors.awaited.remove(param)
        if tensors.awaited:
            return
        if not progress.has_coefficients:
            rates = [device_learning_rate(group) for group in optimizer.param_groups]
            engine.begin_update(optimizer._rows(optimizer._method_rows()), rates)
        engine.read_list(tensors)
        keep_point = optimizer._keeps_point()
        engine.updating(tensors, required=optimizer.required, keep_point=keep_point)()
        for each in tensors.owners:
            each.grad = None
        tensors.release()
        tensors.updated = True


def _awaited(tensors: TensorList, required: int) -> set[Tensor]:
    """Return the parameters whose last gradient an update of their list has to wait for."""
    if not required & 0b01:
        return {param for param in tensors.owners if param.requires_grad}
    pairs = zip(tensors.owners, tensors.grads[0], strict=True)
    return {param for param, g1 in pairs if g1 is not None}


def _weak_hook(handle: InBackwardUpdate) -> Callable[[Tensor], None]:
    reference = weakref.ref(handle)

    def hook(param: Tensor) -> None:
        alive = reference()
        if alive is not None:
            alive._gradient_is_complete(param)

    return hook


def _remove(hooks: dict[Tensor, RemovableHandle]) -> None:
    while hooks:
        hooks.popitem()[1].remove()


def _make_lists_anew(optimizer: SharpnessAwareOptimizer) -> None:
    if optimizer._engine is not None:
        optimizer._engine.lists.stale = True


# ---- what cannot work ------------------------------------------------------------------------


def refuse_while_active(optimizer: Any, what: str, reason: str) -> None:
    """Refuse an argument of a step that does not go with an update in the backward.

    Args:
        optimizer: Whose step it is.
        what: What was given to which method.
        reason: Why it does not work.

    Raises:
        RuntimeError: Parameters are updated within the backward.
    """
    if optimizer._in_backward is not None:
        raise RuntimeError(f"{what} while {_WHAT} is active, but {reason}; remove() its handle")


def _refuse_what_needs_all_gradients(optimizer: SharpnessAwareOptimizer) -> None:
    name = type(optimizer).__name__
    derives = any(row.derive is not None for row in optimizer._method_rows())
    if optimizer.evaluations != 2 or derives:
        raise TypeError(
            f"{name} has no {_WHAT}: its coefficients follow from norms over all of the last "
            "gradients, which a backward does not have before its end"
        )
    if optimizer._rule_class is None:
        base = type(optimizer._base).__name__
        raise TypeError(
            f"base_optimizer is {base}, expected torch.optim.SGD, Adam or AdamW with {_WHAT}: "
            "others step all parameters at once"
        )
    if optimizer._max_norm > 0:
        raise ValueError(
            f"max_grad_norm is {optimizer._max_norm}, expected None with {_WHAT}: the norm of the "
            "second gradient is not known before the end of its backward"
        )
    if optimizer._check_all:
        raise ValueError(
            f"check_finite is True, expected False with {_WHAT}: whether all of the second "
            "gradient is finite is not known before the end of its backward"
        )


def _refuse_averages(optimizer: SharpnessAwareOptimizer) -> None:
    """Refuse gradients that somebody averages over processes after the hooks have seen them.

    DistributedDataParallel does. Those of DTensors are reduced before (FSDP2 calls the hooks then).
    """
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized():
        return
    if distributed.get_world_size() == 1:
        return
    from torch.distributed.tensor import DTensor  # takes long

    for group in optimizer.param_groups:
        for param in group["params"]:
            if not isinstance(param, DTensor):
                raise RuntimeError(
                    f"{_WHAT} was used in a process group of {distributed.get_world_size()} with a "
                    f"parameter of shape {tuple(param.shape)} that is not a DTensor: the hooks of "
                    "such parameters run before DistributedDataParallel averages their gradients"
                )
