"""Finds and loads the compiled extension, and keeps the reason if it cannot be used."""

from __future__ import annotations

from pathlib import Path

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


UNAVAILABLE: str | None = _load()


def cpu_instruction_set() -> str:
    """Name of the instruction set that the CPU kernels run with."""
    return _ISA_NAMES[torch.ops.wsam_fused.cpu_isa()] if UNAVAILABLE is None else "none"
