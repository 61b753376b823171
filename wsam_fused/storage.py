"""Parameters whose memory is exchanged while they are perturbed."""

from __future__ import annotations

import torch

from wsam_fused.backups import Backups
from wsam_fused.gradients import walkable
from wsam_fused.parameters import is_dense
from wsam_fused.tensor_list import TensorList, laid_out_like


def follow_storage(tensors: TensorList, *, same_layout: bool) -> None:
    """Go on with parameters whose memory was exchanged since they were perturbed.

    Args:
        tensors: The list they are in; the backend has to be refreshed afterwards.
        same_layout: Refuse other strides, which the states would not fit; else bring what a restore
            reads into the new layout.

    Raises:
        RuntimeError: A parameter cannot be followed.
    """
    layouts = zip(tensors.params, tensors.reader.noted_layouts, strict=True)
    for param, (shape, stride) in layouts:
        kept = (param.device, param.dtype, param.shape) == (*tensors.key[:2], shape)
        if not kept or not is_dense(param) or (same_layout and param.stride() != stride):
            raise RuntimeError(
                f"a parameter became {param.dtype} of shape {tuple(param.shape)} and strides "
                f"{param.stride()} on {param.device} while it was perturbed as "
                f"{tensors.key.dtype} of shape {tuple(shape)} and strides {stride} on "
                f"{tensors.key.device}; change parameters between steps"
            )
    if tensors.reader.layouts() != tensors.reader.noted_layouts:
        pairs = list(zip(tensors.params, tensors.grads[0], strict=False))  # none before a backward
        tensors.grads[0] = [walkable(p, g, tensors.grad_dtype) for p, g in pairs]
        if tensors.backups is not None:
            copies = zip(tensors.params, tensors.backups.tensors(), strict=True)
            dtype = torch.float32 if tensors.key.has_master else tensors.key.dtype
            again = [laid_out_like(p, copy, dtype) for p, copy in copies]
            tensors.backups = Backups.of(again)
            if tensors.masters is not None:
                tensors.masters = again
    tensors.reader.refresh()
