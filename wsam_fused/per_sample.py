"""The step of methods that look at the loss of every sample."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from wsam_fused.arguments import whole_number
from wsam_fused.autocast import forget_casts
from wsam_fused.optimizer import SharpnessAwareOptimizer
from wsam_fused.plan import Point
from wsam_fused.row import BASE_ROW, Row

LossesFn = Callable[..., Tensor]

_WANTED = "expected one loss per sample, a tensor of shape [B]"


class PerSampleOptimizer(SharpnessAwareOptimizer):
    """Base class: ``step(losses_fn)`` in place of closures, and a seed of its own.

    All random choices of a step follow from the seed and the number of the step, so that a
    checkpoint goes on with those that an uninterrupted run would have made. With sharded parameters
    every rank looks at the samples of its own batch; choices of tensors are the same everywhere;
    noise differs from part to part of a parameter, so that it depends on how they are sharded.
    """

    required = 0b10
    uses_first_gradient = False
    instead_of_calls = (
        "call step(losses_fn), where losses_fn(index=None) returns the losses of the samples"
    )

    @classmethod
    def _check_own(cls, own: dict[str, Any]) -> None:
        super()._check_own(own)
        whole_number("seed", own["seed"], 0)

    def row(self, group: dict[str, Any]) -> Row:
        """Return the coefficients: h = g2."""
        return Row(evaluations=2, h=(0.0, 1.0, 0.0))

    def step(self, closure: Any = None, *, scaler: torch.amp.GradScaler | None = None) -> Any:
        """Perform one whole step.

        Args:
            closure: ``losses_fn(index=None)``: returns the losses of the samples that the int64
                tensor ``index`` selects (of all if it is None), of shape ``[len(index)]`` or
                ``[B]``, neither reduced nor detached nor scaled, and does not call ``backward``.
                Gradients left over from before are cleared.
            scaler: Scales the losses before they are differentiated. Call ``scaler.update()``
                afterwards, and not ``scaler.step()``.

        Returns:
            The mean loss at the unperturbed weights, a scalar.

        Raises:
            TypeError: It is not callable or returns no floating tensor; ``scaler`` is no
                GradScaler.
            ValueError: It returns the wrong shape or a tensor without graph.
            RuntimeError: A CUDA graph is being captured: the host draws random numbers.

        If it raises, the weights are restored and the state is untouched.
        """
        if closure is None and not self.is_perturbed and self._create_state():
            return None  # see SharpnessAwareOptimizer.step
        if not callable(closure):
            name = type(self).__name__
            raise TypeError(
                f"step() of {name} was given {closure!r}, expected a function "
                "losses_fn(index=None) that returns the losses of the samples"
            )
        self._require_idle("step(losses_fn)")
        self._refuse_closure_of_scaler()
        self._replicas.check_closure("step(losses_fn)")
        self._take_scaler(scaler)
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():  # type: ignore[no-untyped-call]
            raise RuntimeError(
                f"step() of {type(self).__name__} draws random numbers on the host, which every "
                "replay of a CUDA graph would repeat; capture the model only"
            )
        self.zero_grad()
        try:
            with torch.enable_grad():
                if self.is_plain_step:
                    loss, perturbed_loss = self._plain_step(closure), None
                else:
                    loss, perturbed_loss = self._sharpness_aware_step(closure)
        except BaseException:
            self.restore()
            raise
        self.last.set_losses(loss, perturbed_loss)
        return loss

    def _sharpness_aware_step(self, losses_fn: LossesFn) -> tuple[Tensor, Tensor]:
        """Update the weights; return the mean losses at w and at w + e, detached."""
        raise NotImplementedError

    # ---- parts of a step ---------------------------------------------------------------------

    def _plain_step(self, losses_fn: LossesFn) -> Tensor:
        losses = losses_with_graph(losses_fn)
        self._backward(losses.mean())
        with torch.no_grad():
            self._begin(take=True).reduce(0)
            self._update([BASE_ROW] * len(self.param_groups), required=0b1)
        return losses.detach().mean()

    @torch.no_grad()
    def _go_to_ascent_point(self) -> None:
        self._replicas.match_gradients(self)
        engine = self._begin(take=True)
        engine.reduce(0)
        engine.move_to(Point.ASCENT)
        self._replicas.begin(self, engine)
        self._batch_norm.save()

    @torch.no_grad()
    def _finish(self) -> None:
        self._complete(zero_grad=True)

    def _backward(self, loss: Tensor) -> None:
        """Add the gradients of a scalar to ``.grad``, times the loss scale if there is one."""
        torch.autograd.backward(loss if self._scaler is None else self._scaler.scale(loss))

    def _seed(self) -> int:
        """Return a number for this step; those of other seeds and steps are far away."""
        seed: int = self.own(self.param_groups[0], "seed")
        return (seed * 0x9E3779B97F4A7 + self._steps() + 1) % 2**52


@contextmanager
def frozen(params: Sequence[Tensor]) -> Iterator[None]:
    """Form no gradients for ``params``, which all require one."""
    for param in params:
        param.requires_grad_(False)
    try:
        yield
    finally:
        for param in params:
            param.requires_grad_(True)


def losses_with_graph(
    losses_fn: LossesFn, *, index: Tensor | None = None, count: int | None = None
) -> Tensor:
    """Evaluate losses to be differentiated; see :func:`losses_of`."""
    with torch.enable_grad():
        losses = losses_of(losses_fn, index=index, count=count)
    if not losses.requires_grad:
        raise ValueError(
            "losses_fn returned a tensor without graph, expected losses that depend on the "
            "parameters; do not detach them"
        )
    return losses


def losses_of(
    losses_fn: LossesFn, *, index: Tensor | None = None, count: int | None = None
) -> Tensor:
    """Evaluate losses and check them.

    Args:
        losses_fn: See :meth:`PerSampleOptimizer.step`.
        index: Which samples; None for all.
        count: How many losses there have to be; None if it is not known.

    Raises:
        TypeError: It returned no floating tensor.
        ValueError: It returned another shape.
    """
    losses = losses_fn() if index is None else losses_fn(index)
    if not torch.is_grad_enabled():
        forget_casts()
    if not isinstance(losses, Tensor):
        raise TypeError(f"losses_fn returned {type(losses).__name__}, {_WANTED}")
    if not losses.is_floating_point():
        raise TypeError(f"losses_fn returned a tensor of {losses.dtype}, {_WANTED}")
    if losses.dim() != 1 or losses.numel() == 0:
        hint = "; use reduction='none'" if losses.dim() == 0 else ""
        raise ValueError(f"losses_fn returned the shape {list(losses.shape)}, {_WANTED}{hint}")
    if count is not None and len(losses) != count:
        asked = "all samples again" if index is None else f"{count} selected samples"
        raise ValueError(f"losses_fn returned {len(losses)} losses for {asked}, expected {count}")
    return losses
