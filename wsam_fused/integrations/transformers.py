"""Hugging Face Transformers: a Trainer whose steps evaluate their batches twice."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from torch import Tensor

from wsam_fused.integrations.prepared import clip_scaled, sharpness_aware
from wsam_fused.integrations.window import Window

try:
    from transformers import Trainer
except ImportError as error:
    raise ImportError(
        "wsam_fused.integrations.transformers needs Transformers with its Trainer: "
        "pip install 'transformers[torch]'"
    ) from error

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object

_UNSUPPORTED = ("DEEPSPEED", "MEGATRON_LM", "XLA")


class SharpnessAwareTrainerMixin(_Base):
    """Makes any ``Trainer`` take an optimizer of this package; name it before the Trainer.

    The micro-batches of an optimizer step (``gradient_accumulation_steps``) are evaluated again at
    the perturbed weights, with one perturbation for all of them, by the Trainer's own
    ``training_step``. ``max_grad_norm`` clips each gradient of a step by itself, as that of the
    optimizer does. Losses, token counts and the learning rate are those of the first evaluation
    and of one step; ``log`` does nothing in the others.

    Raises:
        TypeError: The optimizer is of another kind.
        ValueError: A backend keeps the gradients to itself (DeepSpeed, Megatron-LM, XLA).

    Example:
        >>> class MyTrainer(SharpnessAwareTrainerMixin, Trainer):
        ...     pass
        >>> optimizer = WSAM(model.parameters(), torch.optim.AdamW, rho=0.05, lr=5e-5)
        >>> MyTrainer(model, args, train_dataset=data, optimizers=(optimizer, None)).train()
    """

    _window: Window | None = None
    _evaluates_again = False

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Check the optimizer, and begin without micro-batches; called before each training."""
        created = super().create_optimizer(*args, **kwargs)
        optimizer = sharpness_aware(self.optimizer, "the Trainer's optimizer")
        optimizer.second_evaluation_scaler = self.accelerator.scaler
        kind = self.accelerator.distributed_type.value
        if kind in _UNSUPPORTED:
            raise ValueError(f"the Trainer runs on {kind}, expected one process, DDP or FSDP")
        self._window = Window(self._evaluate_microbatch, self._without_sync)
        return created

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; see ``Trainer.train``."""
        try:
            return super().train(*args, **kwargs)
        finally:
            if self._window is not None:
                sharpness_aware(self.optimizer, "the Trainer's optimizer").second_evaluation = None
                self._window = None

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Evaluate a micro-batch and remember it; see ``Trainer.training_step``."""
        window = self._window
        if window is None:
            loss: Tensor = super().training_step(model, inputs, *args, **kwargs)
            return loss
        kept = copy.copy(inputs)
        loss = super().training_step(model, inputs, *args, **kwargs)
        last = self.accelerator.sync_gradients
        window.add(model, kept, args, kwargs, is_last=last)
        if last:
            optimizer = sharpness_aware(self.optimizer, "the Trainer's optimizer")
            optimizer.second_evaluation = self._evaluate_window_again
        return loss

    def log(self, *args: Any, **kwargs: Any) -> None:
        """Log, unless the weights are perturbed; see ``Trainer.log``."""
        if not self._evaluates_again:
            super().log(*args, **kwargs)

    def _evaluate_window_again(self) -> Tensor:
        assert self._window is not None  # it is what calls this
        self._evaluates_again = True
        try:
            losses = self._window.evaluate()
        finally:
            self._evaluates_again = False
        self._clip_as_the_trainer()
        total: Tensor = sum(losses[1:], losses[0])
        return total

    def _clip_as_the_trainer(self) -> None:
        """Do with a later gradient what the Trainer did with g1."""
        limit = self.args.max_grad_norm
        if limit is None or limit <= 0:
            return
        if self.accelerator.scaler is not None:  # which unscales only once in a step
            optimizer = sharpness_aware(self.optimizer, "the Trainer's optimizer")
            clip_scaled(optimizer, limit, self.accelerator.scaler)
        elif hasattr(self, "_clip_grad_norm"):
            self._clip_grad_norm(self.model_wrapped)
        else:  # older Trainers have it in their loop
            self.accelerator.clip_grad_norm_(self.model_wrapped.parameters(), limit)

    def _evaluate_microbatch(
        self, model: Any, inputs: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        loss: Tensor = super().training_step(model, copy.copy(inputs), *args, **kwargs)
        return loss

    def _without_sync(self) -> Any:
        return self.accelerator.no_sync(self.model_wrapped)


class SharpnessAwareTrainer(SharpnessAwareTrainerMixin, Trainer):
    """The Trainer of Transformers for an optimizer of this package; see the mixin."""
