"""Triton kernels for GPUs: needs no CUDA toolkit on the user's machine.

Triton is imported when the backend is asked for first, never by importing this package. It compiles
its own launcher with a C compiler, which it looks for then.
"""

from __future__ import annotations

import re
from contextlib import AbstractContextManager
from functools import cache
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from wsam_fused.backends import gpu, pointers
from wsam_fused.backends.pointers import GRADIENT_ROWS, table_of
from wsam_fused.base_rules import BaseRule
from wsam_fused.plan import Point
from wsam_fused.tensor_list import TensorList
from wsam_fused.uninterrupted import Change

OLDEST_TRITON = (3, 6)


class TritonBackend:
    """The three operations as Triton kernels, compiled when they are launched first."""

    DEVICE_TYPES: tuple[str, ...] = ("cuda",)
    DTYPES = gpu.DTYPES
    GRADIENT_DTYPES = gpu.GRADIENT_DTYPES

    def unavailable(self) -> str | None:
        """Why this backend cannot be used here, or None."""
        if not torch.cuda.is_available():
            return _no_gpu()
        return import_problem() or _launch_problem()

    def device_problem(self, device: torch.device) -> str | None:
        """Why the kernels cannot run on one GPU, or None."""
        return gpu.too_old(device)

    def bind(self, tensors: TensorList, evaluation: int, addresses: Tensor) -> None:
        """Take over the addresses of the gradients of one evaluation, 0 for g1."""
        pointers.bind(tensors, evaluation, addresses, gpu.chunk_size)

    def refresh(self, tensors: TensorList) -> None:
        """Take over the addresses of the parameters and of what a restore reads again."""
        pointers.refresh(tensors)

    def reduce(
        self, tensors: TensorList, evaluation: int, *, with_first: bool, accumulate: bool
    ) -> None:
        """Write the sums over one gradient list to the shared scalars, or add them."""
        kernel = _module("reduce")
        gradient = GRADIENT_ROWS[evaluation]
        pairing = kernel.pairing_of(gradient, tensors.key.geometry, with_first=with_first)
        with self.on_device(tensors.key.device):
            per_processor = kernel.programs_per_processor(tensors.grad_dtype, pairing)
            programs = self.programs(tensors, per_processor)
            kernel.launch(tensors, programs, gradient, pairing, accumulate=accumulate)

    def perturb(self, tensors: TensorList, target: Point) -> None:
        """Move the parameters from where they are to another point."""
        kernel = _module("perturb")
        if target != Point.WEIGHTS:
            pointers.bind_backups(tensors)
        with self.on_device(tensors.key.device):
            programs = self.programs(tensors, kernel.PROGRAMS_PER_PROCESSOR)
            kernel.launch(tensors, programs, target)

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
        """Return what restores w, steps the base rule and subtracts the decoupled term.

        Triton launches kernels from Python, where signals may come in between.
        """
        kernel = _module("update")
        per_processor = kernel.programs_per_processor(tensors.key.dtype, rule)
        programs = self.programs(tensors, per_processor)

        def update() -> None:
            with self.on_device(tensors.key.device):
                kernel.launch(
                    tensors,
                    programs,
                    rule,
                    evaluations,
                    required=required,
                    checked=checked,
                    keep_point=keep_point,
                    count_skipped=count_skipped,
                )

        return update

    def on_device(self, device: torch.device) -> AbstractContextManager[object]:
        """Make ``device`` the one that kernels are launched on."""
        return torch.cuda.device(device)

    def programs(self, tensors: TensorList, per_processor: int) -> int:
        """How many programs share the chunks of a list."""
        chunks = table_of(tensors).chunks.shape[0]
        return min(chunks, per_processor * _processors(tensors.key.device))


def _no_gpu() -> str:
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} has no GPU support; install a CUDA build of torch"
    return "torch finds no GPU; check the driver with nvidia-smi"


@cache
def import_problem() -> str | None:
    """Why the kernels cannot be imported, or None."""
    oldest = ".".join(map(str, OLDEST_TRITON))
    try:
        found = str(import_module("triton").__version__)
        numbers = re.match(r"(\d+)\.(\d+)", found)
        if numbers is None or tuple(map(int, numbers.groups())) < OLDEST_TRITON:
            return f"triton {found} is too old; run: pip install 'triton>={oldest}'"
        for name in ("reduce", "perturb", "update"):
            _module(name)
    except ModuleNotFoundError as error:
        if error.name == "triton":
            return f"triton is not installed; run: pip install 'triton>={oldest}'"
        return _cannot_import(error)
    except Exception as error:  # whatever is wrong with it, there are other backends
        return _cannot_import(error)
    return None


@cache
def _launch_problem() -> str | None:
    """Why kernels cannot be launched although they can be imported, or None."""
    try:
        _ = import_module("triton.runtime").driver.active.utils
    except Exception as error:  # whatever is wrong with it, there are other backends
        return (
            "triton cannot prepare launches; it needs a C compiler (gcc or clang) and Python's "
            f"headers: {type(error).__name__}: {error}"
        )
    return None


def _cannot_import(error: Exception) -> str:
    return f"triton cannot be imported, install it again: {type(error).__name__}: {error}"


@cache
def _module(name: str) -> ModuleType:
    return import_module(f"{__name__}.{name}")


@cache
def _processors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


TRITON = TritonBackend()
