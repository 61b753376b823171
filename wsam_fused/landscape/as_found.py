"""Leaves a model as it was found, whatever evaluations do to it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from wsam_fused.autocast import forget_casts
from wsam_fused.random_state import RandomState


class SameStart:
    """Lets every evaluation begin with the same buffers, modes and random numbers.

    Args:
        model: Whose modes and buffers are meant, as they are now.
    """

    def __init__(self, model: nn.Module) -> None:
        self._random = RandomState(model.parameters())
        self._modes = [(module, module.training) for module in model.modules()]
        self._buffers = [
            (module, name, buffer, buffer.clone() if _is_writable(buffer) else None)
            for module in model.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Surround a whole evaluation of the loss, and all use of its graph.

        Buffers are put back at the end only: writing to them would make a graph useless.
        """
        with self._random.replayed():
            try:
                yield
            finally:
                self._restore_modules()

    @torch.no_grad()
    def _restore_modules(self) -> None:
        for module, training in self._modes:
            module.training = training
        for module, name, buffer, copy in self._buffers:
            module._buffers[name] = buffer  # a module may have put another tensor there
            if copy is not None:
                buffer.copy_(copy)


@contextmanager
def as_found(model: nn.Module) -> Iterator[SameStart]:
    """Take ``.grad`` out of all parameters, and leave them, buffers, modes and generators as found.

    The weights are the caller's to put back. ``.grad`` is taken out so that nothing can be added to
    it.
    """
    start = SameStart(model)
    grads = [(param, param.grad) for param in model.parameters()]
    with start.evaluation():
        try:
            for param, _ in grads:
                param.grad = None
            yield start
        finally:
            for param, grad in grads:
                param.grad = grad
            forget_casts()


def _is_writable(buffer: Tensor) -> bool:
    """Whether an evaluation can write to a buffer; not if its elements share memory."""
    if buffer.layout != torch.strided:
        return True
    pairs = zip(buffer.shape, buffer.stride(), strict=True)
    return all(stride != 0 or size < 2 for size, stride in pairs)
