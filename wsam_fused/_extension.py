"""Finds and loads the compiled extension, and keeps the reason if it cannot be used."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache
from importlib.machinery import ExtensionFileLoader
from pathlib import Path
from typing import Any

import torch

from wsam_fused.plan import LAYOUT

_ISA_NAMES = ("baseline", "AVX2", "AVX-512")


def _library(name: str) -> Path | None:
    """Find a compiled library in the package's own folder."""
    folder = Path(__file__).parent
    files = sorted([*folder.glob(f"{name}*.so"), *folder.glob(f"{name}*.pyd")])
    return files[0] if files else None


def _load() -> str | None:
    """Load the operations and the CPU kernels; return why not, or None."""
    file = _library("_C")
    if file is None:
        return "the extension is not built; run: pip install --no-build-isolation -e ."
    name = file.name
    try:
        torch.ops.load_library(str(file))  # type: ignore[no-untyped-call]
        found = list(torch.ops.wsam_fused.layout())
    except (OSError, RuntimeError, AttributeError) as error:
        return f"{name} does not load with torch {torch.__version__}: {error}"
    return _layout_problem(name, found)


@cache
def cuda_unavailable() -> str | None:
    """Load the CUDA kernels when they are asked for first; return why not, or None."""
    if UNAVAILABLE is not None:
        return UNAVAILABLE
    if torch.version.cuda is None:
        return f"torch {torch.__version__} has no CUDA support; install a CUDA build of torch"
    file = _library("_cuda")
    if file is None:
        return (
            "the CUDA kernels are not built; install a CUDA toolkit (nvcc) and run: "
            "pip install --no-build-isolation -e ."
        )
    if not torch.cuda.is_available():
        return "torch finds no GPU; check the driver with nvidia-smi"
    try:
        torch.ops.load_library(str(file))  # type: ignore[no-untyped-call]
        found = list(torch.ops.wsam_fused.cuda_layout())
    except (OSError, RuntimeError, AttributeError) as error:
        return f"{file.name} does not load with torch {torch.__version__}: {error}"
    return _layout_problem(file.name, found)


@cache
def cuda_device_problem(device: torch.device) -> str | None:
    """Ask CUDA whether the kernels run on one GPU; return why not, or None."""
    index = torch.cuda.current_device() if device.index is None else device.index
    try:
        torch.ops.wsam_fused.require_cuda_device(index)
    except RuntimeError as error:
        return (
            f"{str(error).splitlines()[0]}; the kernels were compiled for compute capability "
            f"{cuda_architectures()}; build them with this machine's CUDA toolkit"
        )
    return None


def _layout_problem(name: str, found: list[int]) -> str | None:
    if found == LAYOUT:
        return None
    return f"{name} was built from other sources (layout {found}, expected {LAYOUT}); rebuild"


def _load_reader() -> Callable[..., list[Any] | None] | None:
    """Return the function that reads gradients, or None where it is not built."""
    file = _library("_C")
    if UNAVAILABLE is not None or file is None:
        return None
    # From that very file: an import would take another build beside it, and look elsewhere too.
    name = f"{__package__}._C"
    spec = importlib.util.spec_from_loader(name, ExtensionFileLoader(name, str(file)))
    assert spec is not None and spec.loader is not None
    try:
        module = importlib.util.module_from_spec(spec)
    except ImportError:  # built where Python's headers were missing
        return None
    spec.loader.exec_module(module)
    reader: Callable[..., list[Any] | None] = module.read_gradients
    return reader


UNAVAILABLE: str | None = _load()

# Reads gradients in one pass (csrc/python/module.cpp); without it gradients.py does the same.
READ_GRADIENTS = _load_reader()


def cpu_instruction_set() -> str:
    """Name of the instruction set that the CPU kernels run with."""
    return _ISA_NAMES[torch.ops.wsam_fused.cpu_isa()] if UNAVAILABLE is None else "none"


def cuda_architectures() -> str:
    """Compute capabilities that the CUDA kernels were compiled for."""
    if cuda_unavailable() is not None:
        return "not loaded"
    found = torch.ops.wsam_fused.cuda_architectures()
    return ", ".join(f"{value // 100}.{value % 100 // 10}" for value in found)
