"""Imports timm where torchvision cannot be had, as for a torch without CUDA from PyPI.

timm names torchvision's classes when it is imported, and uses them for reading and transforming
images only; models, schedules, averages, losses and Mixup are its own.
"""

from __future__ import annotations

import enum
import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

MODULES = ("", ".datasets", ".ops", ".ops.misc", ".transforms", ".transforms.functional")


class _InterpolationMode(enum.Enum):
    NEAREST = "nearest"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    BOX = "box"
    HAMMING = "hamming"
    LANCZOS = "lanczos"


class _Module(ModuleType):
    """Has an empty class of every name."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name == "InterpolationMode":
            return _InterpolationMode
        return type(name, (), {})


@contextmanager
def _stand_in() -> Iterator[None]:
    modules = {"torchvision" + name: _Module("torchvision" + name) for name in MODULES}
    for name, module in modules.items():
        module.__path__ = []
        parent, _, own = name.rpartition(".")
        if parent:
            setattr(modules[parent], own, module)
    sys.modules.update(modules)
    try:
        yield
    finally:  # others would take it for the real one
        for name in modules:
            del sys.modules[name]


def import_timm() -> ModuleType:
    """Import timm, with torchvision if that works.

    Raises:
        ImportError: timm itself is not installed.
    """
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):  # RuntimeError: its operators are for another torch
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        with _stand_in():
            return importlib.import_module("timm")
    return importlib.import_module("timm")
