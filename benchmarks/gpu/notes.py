"""Why a row of the report has no figures."""

from __future__ import annotations

import torch

OUT_OF_TIME = "out of time"
# How the notes begin that tell of a fault; all others tell of a lack of time, memory or hardware.
FAILED, DIFFERENT = "failed: ", "computes something else: "


def reason_of(error: Exception) -> str:
    """Say in one line why a contender could not be measured."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of device memory"
    lines = str(error).strip().splitlines()
    return f"{FAILED}{type(error).__name__}: {lines[0][:120] if lines else ''}"


def is_fault(note: str) -> bool:
    """Whether a note tells of a fault."""
    return note.startswith((FAILED, DIFFERENT))
