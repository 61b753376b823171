"""The compiled kernels: passes the addresses of a tensor list to the extension. No arithmetic."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from wsam_fused import _extension
from wsam_fused.backends import gpu, pointers
from wsam_fused.backends.pointers import GRADIENT_ROWS, table_of
from wsam_fused.base_rules import BaseRule
from wsam_fused.plan import Point
from wsam_fused.tensor_list import TensorList
from wsam_fused.uninterrupted import Change

# Elements per chunk on a CPU: five streams of a chunk stay inside a second-level cache, and a
# thread's share of a list is balanced to one of them.
CPU_CHUNK_SIZE = 16384


class NativeBackend:
    """Kernels of the extension for one type of device.

    Args:
        device_type: Where parameters are.
        dtypes: Dtypes of parameters.
        gradient_dtypes: Dtypes that gradients of such parameters may have besides.
    """

    def __init__(
        self,
        device_type: str,
        dtypes: tuple[torch.dtype, ...],
        gradient_dtypes: dict[torch.dtype, tuple[torch.dtype, ...]],
    ) -> None:
        self.DEVICE_TYPES: tuple[str, ...] = (device_type,)
        self.DTYPES = dtypes
        self.GRADIENT_DTYPES = gradient_dtypes

    @property
    def _operations(self) -> Any:
        return torch.ops.wsam_fused

    def unavailable(self) -> str | None:
        """Why this backend cannot be used here, or None."""
        return _extension.UNAVAILABLE

    def device_problem(self, device: torch.device) -> str | None:
        """None: every CPU will do."""
        return None

    def chunk_size(self, total: int) -> int:
        """Elements per chunk for a list of ``total`` elements."""
        return CPU_CHUNK_SIZE

    def bind(self, tensors: TensorList, evaluation: int, addresses: Tensor) -> None:
        """Take over the addresses of the gradients of one evaluation, 0 for g1."""
        pointers.bind(tensors, evaluation, addresses, self.chunk_size)

    def refresh(self, tensors: TensorList) -> None:
        """Take over the addresses of the parameters and of what a restore reads again."""
        pointers.refresh(tensors)

    def reduce(
        self, tensors: TensorList, evaluation: int, *, with_first: bool, accumulate: bool
    ) -> None:
        """Write the sums over one gradient list to the shared scalars, or add them."""
        table = table_of(tensors)
        self._operations.reduce.default(
            table.table,
            table.chunks,
            table.chunk_size,
            tensors.key.dtype,
            tensors.grad_dtype,
            tensors.shared.groups,
            table.partials,
            tensors.shared.scalars,
            tensors.flags,
            GRADIENT_ROWS[evaluation],
            tensors.key.geometry,
            with_first,
            accumulate,
            tensors.key.has_master,
        )

    def perturb(self, tensors: TensorList, target: Point) -> None:
        """Move the parameters from where they are to another point."""
        table = table_of(tensors)
        if target != Point.WEIGHTS:
            pointers.bind_backups(tensors)
        self._operations.perturb_.default(
            table.table,
            table.chunks,
            table.chunk_size,
            tensors.key.dtype,
            tensors.grad_dtype,
            tensors.shared.groups,
            tensors.shared.scalars,
            tensors.flags,
            tensors.key.geometry,
            tensors.backups is not None,
            tensors.key.has_master,
            target,
        )

    def updating(
        self,
        tensors: TensorList,
        rule: BaseRule,
        evaluations: int,
        *,
        required: int,
        checked: int,
        keep_point: bool,
        count_skipped: bool,
    ) -> Change:
        """Return what restores w, steps the base rule and subtracts the decoupled term."""
        table = table_of(tensors)
        return partial(
            self._operations.update_.default._op,  # the operator itself is a Python function
            table.table,
            table.chunks,
            table.chunk_size,
            tensors.key.dtype,
            tensors.grad_dtype,
            tensors.key.state_dtype,
            tensors.shared.groups,
            tensors.shared.scalars,
            tensors.flags,
            tensors.steps,
            rule,
            evaluations,
            required,
            checked,
            tensors.backups is not None,
            tensors.key.has_master,
            keep_point,
            count_skipped,
            -1 if rule == BaseRule.NONE else tensors.rounding_seed,
        )


class CudaBackend(NativeBackend):
    """Kernels of the extension for NVIDIA GPUs."""

    def unavailable(self) -> str | None:
        """Why this backend cannot be used here, or None."""
        return _extension.cuda_unavailable()

    def device_problem(self, device: torch.device) -> str | None:
        """Why the kernels cannot run on one GPU, or None."""
        return gpu.too_old(device) or _extension.cuda_device_problem(device)

    def chunk_size(self, total: int) -> int:
        """Elements per chunk for a list of ``total`` elements."""
        return gpu.chunk_size(total)


CPU = NativeBackend("cpu", (torch.float32, torch.float64, torch.bfloat16, torch.float16), {})
CUDA = CudaBackend("cuda", gpu.DTYPES, gpu.GRADIENT_DTYPES)
