"""Gives gradients to a base optimizer that is stepped as it is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def gradients_for_step(params: Sequence[Tensor], grads: Sequence[Tensor | None]) -> Iterator[None]:
    """Put ``grads`` into ``.grad`` while a base optimizer steps ``params``.

    They have the dtype of their parameters. They stay in ``.grad`` afterwards, except where the
    parameter says (``grad_dtype``) that its gradients are of another one.
    """
    asked: list[tuple[Tensor, torch.dtype]] = []
    try:
        for param, grad in zip(params, grads, strict=True):
            dtype = getattr(param, "grad_dtype", None)
            if grad is not None and dtype not in (None, grad.dtype):
                asked.append((param, dtype))
                param.grad = None
                param.grad_dtype = None
            param.grad = grad
        yield
    finally:
        for param, dtype in asked:
            param.grad = None
            param.grad_dtype = dtype
