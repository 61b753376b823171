"""Keeps BatchNorm's running statistics out of the perturbed evaluations."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase


class FrozenBatchNorm:
    """Saves the running statistics of a model and puts them back.

    The values are saved, not the momentum set to zero: with momentum 0 a non-finite perturbed
    activation still poisons the statistics, and ``num_batches_tracked`` still counts. The buffers
    stay the same tensors.

    Args:
        model: The model; None makes both methods do nothing.
    """

    def __init__(self, model: nn.Module | None) -> None:
        if model is not None and not isinstance(model, nn.Module):
            raise TypeError(f"model is {type(model).__name__}, expected a torch.nn.Module or None")
        self.model = model
        self._saved: list[tuple[Tensor, Tensor]] = []

    def save(self) -> None:
        """Remember the statistics of every normalization layer that is in training mode."""
        if self.model is None:
            return
        self._saved = [
            (buffer, buffer.clone())
            for module in self.model.modules()
            if isinstance(module, _NormBase) and module.training
            for buffer in module.buffers(recurse=False)
        ]

    def restore(self) -> None:
        """Put the remembered statistics back, if there are any."""
        if self._saved:
            saved = self._saved
            torch._foreach_copy_([buffer for buffer, _ in saved], [copy for _, copy in saved])
            self._saved = []  # not before: it may be interrupted
