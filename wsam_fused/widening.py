"""Gradients of several evaluations that came in several dtypes."""

from __future__ import annotations

from wsam_fused.backends import BACKENDS
from wsam_fused.gradients import walkable
from wsam_fused.plan import addresses_of
from wsam_fused.tensor_list import TensorList


def widen_gradients(tensors: TensorList) -> None:
    """Give all gradients of a list that have been read the dtype of its parameters."""
    dtype = tensors.key.dtype
    wide = []  # all that can fail comes before anything changes
    for grads in tensors.grads[: len(tensors.addresses)]:
        pairs = zip(tensors.params, grads, strict=True)
        same = [walkable(param, grad, dtype) for param, grad in pairs]
        wide.append((same, addresses_of(same)))
    tensors.grad_dtype = dtype
    for evaluation, (grads, addresses) in enumerate(wide):
        tensors.grads[evaluation] = grads
        BACKENDS[tensors.key.backend].bind(tensors, evaluation, addresses)
