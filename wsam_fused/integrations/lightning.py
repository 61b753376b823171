"""PyTorch Lightning: a callback for gradient accumulation and for what is logged.

Lightning calls ``optimizer.step(closure)``, which evaluates ``training_step`` as often as the
method needs. That is all there is to it without the callback. But with ``accumulate_grad_batches``
only the last micro-batch would count, and ``self.log`` and metrics would see the perturbed
evaluations too.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from wsam_fused.integrations.prepared import sharpness_aware

try:
    from lightning.pytorch.callbacks import Callback
except ImportError:
    try:
        from pytorch_lightning.callbacks import Callback
    except ImportError as error:
        raise ImportError(
            "wsam_fused.integrations.lightning needs Lightning: pip install lightning"
        ) from error

from torchmetrics import Metric


class SharpnessAware(Callback):
    """Makes a step of several evaluations look like one, for automatic optimization.

    The micro-batches of ``accumulate_grad_batches`` are evaluated again at the perturbed weights,
    with one perturbation for all of them, so that a step is that with one large batch. In these
    evaluations ``self.log`` does nothing, and metrics of torchmetrics that are attributes of the
    module do not change. ``outputs`` of ``on_train_batch_end`` are those of the unperturbed one.

    Without the callback, ``precision="16-mixed"`` is an error. With it and ``gradient_clip_val``
    Lightning refuses; clip with ``max_grad_norm`` of the optimizer.

    ``gradient_clip_val`` clips each gradient of a step by itself, g1 before the perturbation. By
    norm, this is ``max_grad_norm`` of the optimizer up to rounding (not with
    ``geometry="fisher"``, whose metric depends on the size of g1).

    Raises:
        TypeError: The optimizer is not one of this package, or wants a loss for every sample.
        ValueError: Manual optimization, a strategy that accumulates by itself (DeepSpeed), or a
            ``training_step`` that takes ``dataloader_iter``.

    Example:
        >>> trainer = Trainer(callbacks=[SharpnessAware()], accumulate_grad_batches=4)
    """

    def __init__(self) -> None:
        self._batches: list[tuple[Any, int]] = []
        self._original: Callable[..., Any] | None = None

    # ---- hooks -------------------------------------------------------------------------------

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Check what is to be trained, and wrap the module's ``optimizer_step``."""
        _check(trainer, pl_module)
        self._batches = []
        original = self._original = pl_module.optimizer_step

        def optimizer_step(
            epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None
        ) -> None:
            step = _Step(trainer, pl_module, self._batches[:-1], optimizer_closure)
            step.run(lambda closure: original(epoch, batch_idx, optimizer, closure))

        pl_module.optimizer_step = optimizer_step

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Remember a micro-batch."""
        if batch_idx % trainer.accumulate_grad_batches == 0:  # when Lightning clears the gradients
            self._batches = []
        self._batches.append((batch, batch_idx))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Leave the module as it was."""
        if self._original is not None:
            del pl_module.optimizer_step
            self._original = None
        self._batches = []

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Leave the module as it was."""
        self.on_train_end(trainer, pl_module)


class _Step:
    """A step of the optimizer.

    Args:
        trainer: The trainer.
        module: What it trains.
        earlier: Micro-batches that have been evaluated for this step, and their numbers.
        closure: Evaluates the last one.
    """

    def __init__(
        self, trainer: Any, module: Any, earlier: list[tuple[Any, int]], closure: Any
    ) -> None:
        self._trainer = trainer
        self._module = module
        self._earlier = earlier
        self._closure = closure
        self._optimizer: Optimizer = trainer.optimizers[0]
        self._evaluations = 0
        self._first_result: Any = None
        self._accumulated: list[tuple[Tensor, Tensor]] = []
        self._silence = ExitStack()

    def run(self, step: Callable[[Callable[[], Any]], Any]) -> None:
        """Step with a closure that evaluates all micro-batches."""
        if self._earlier:  # the optimizer clears what it finds; the closure brings it back
            params = [p for group in self._optimizer.param_groups for p in group["params"]]
            self._accumulated = [(p, p.grad) for p in params if p.grad is not None]
            for param, _ in self._accumulated:
                param.grad = None
        optimizer = sharpness_aware(self._optimizer, "the module's optimizer")
        # With a GradScaler, Lightning evaluates the closure once and calls step() without it.
        scaler = getattr(self._trainer.precision_plugin, "scaler", None)
        if scaler is not None:
            optimizer.second_evaluation_scaler = scaler
            optimizer.second_evaluation = self._evaluate
        try:
            with self._silence:
                step(self._evaluate)
        finally:
            optimizer.second_evaluation = None
        if self._evaluations:  # Lightning reads the loss and the outputs from there
            self._closure._result = self._first_result

    def _evaluate(self) -> Any:
        self._evaluations += 1
        if self._evaluations == 1:
            for param, grad in self._accumulated:
                param.grad = grad
            self._accumulated = []
            loss = self._closure()
            self._first_result = self._closure._result
            return loss
        if self._evaluations == 2:
            self._silence.enter_context(_silenced(self._module))
        for batch, batch_idx in self._earlier:
            self._evaluate_again(batch, batch_idx)
        return self._closure()

    @torch.enable_grad()
    def _evaluate_again(self, batch: Any, batch_idx: int) -> None:
        strategy = self._trainer.strategy
        without_sync = getattr(strategy, "block_backward_sync", nullcontext)
        with without_sync():
            output = strategy.training_step(*_arguments(self._module, batch, batch_idx))
            loss = output["loss"] if isinstance(output, Mapping) else output
            if loss is not None:
                share = loss / self._trainer.accumulate_grad_batches
                strategy.backward(share, self._optimizer)


def _check(trainer: Any, module: Any) -> None:
    if not module.automatic_optimization:
        raise ValueError(
            "automatic_optimization is False, expected True; in manual optimization call "
            "step(closure) of the optimizer, without the callback"
        )
    for optimizer in trainer.optimizers:
        sharpness_aware(optimizer, "the module's optimizer")
    if trainer.strategy.handles_gradient_accumulation:
        name = type(trainer.strategy).__name__
        raise ValueError(f"strategy is {name}, expected one that leaves gradients in .grad")
    if "dataloader_iter" in inspect.signature(module.training_step).parameters:
        raise ValueError(
            "training_step takes dataloader_iter, expected batch: each evaluation would take "
            "another batch from the iterator"
        )


def _arguments(module: Any, batch: Any, batch_idx: int) -> tuple[Any, ...]:
    """Return what Lightning passes to ``training_step``, which may do without ``batch_idx``."""
    parameters = list(inspect.signature(module.training_step).parameters.values())
    only_batch = len(parameters) == 1 and parameters[0].kind != inspect.Parameter.VAR_POSITIONAL
    return (batch,) if only_batch else (batch, batch_idx)


class _silenced:
    """The context in which a module logs nothing and its metrics keep their state.

    Args:
        module: The module.
    """

    def __init__(self, module: Any) -> None:
        self._module = module
        self._saved: list[tuple[Metric, dict[str, Any]]] = []

    def __enter__(self) -> None:
        self._module.log = lambda *args, **kwargs: None
        for metric in self._module.modules():
            if isinstance(metric, Metric):
                self._saved.append((metric, _copied(metric)))

    def __exit__(self, *exception: object) -> None:
        del self._module.log
        for metric, attributes in self._saved:
            vars(metric).update(attributes)


def _copied(metric: Metric) -> dict[str, Any]:
    """Return the attributes of a metric, with copies of its state."""
    attributes = dict(vars(metric))
    for name, value in metric.metric_state.items():
        attributes[name] = list(value) if isinstance(value, list) else value.detach().clone()
    return attributes
