"""Where a warning points: into the code of whoever called this package."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import torch

# What lies between a user and a warning: this package, and torch's wrappers around its methods.
_INNER = (str(Path(__file__).parent), str(Path(torch.__file__).parent), str(contextlib.__file__))


def stacklevel_of_caller() -> int:
    """Return the ``stacklevel`` for ``warnings.warn`` in the function that calls this one."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INNER):
        level, frame = level + 1, frame.f_back
    return level
