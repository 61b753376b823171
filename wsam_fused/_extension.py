"""Finds and loads the compiled extension, and keeps the reason if it cannot be used."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from wsam_fused.plan import LAYOUT

_ISA_NAMES = ("baseline", "AVX2", "AVX-512")


def _load() -> str | None:
    """Load the extension from the package's own folder; return why not, or None."""
    folder = Path(__file__).parent
    files = sorted([*folder.glob("_C*.so"), *folder.glob("_C*.pyd")])
    if not files:
        return "the extension is not built; run: pip install --no-build-isolation -e ."
    name = files[0].name
    try:
        torch.ops.load_library(str(files[0]))  # type: ignore[no-untyped-call]
        found = list(torch.ops.wsam_fused.layout())
    except (OSError, RuntimeError, AttributeError) as error:
        return f"{name} does not load with torch {torch.__version__}: {error}"
    if found != LAYOUT:
        return f"{name} was built from other sources (layout {found}, expected {LAYOUT}); rebuild"
    return None


def _load_reader() -> Callable[..., list[Any] | None] | None:
    """Return the function that reads gradients, or None where it is not built."""
    if UNAVAILABLE is not None:
        return None
    try:
        module = importlib.import_module("wsam_fused._C")
    except ImportError:  # built where Python's headers were missing
        return None
    reader: Callable[..., list[Any] | None] = module.read_gradients
    return reader


UNAVAILABLE: str | None = _load()

# Reads gradients in one pass (csrc/python/module.cpp); without it gradients.py does the same.
READ_GRADIENTS = _load_reader()


def cpu_instruction_set() -> str:
    """Name of the instruction set that the CPU kernels run with."""
    return _ISA_NAMES[torch.ops.wsam_fused.cpu_isa()] if UNAVAILABLE is None else "none"
