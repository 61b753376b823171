"""The Triton kernels under Triton's interpreter: a backend for tests without a GPU."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from wsam_fused.backends.triton import TritonBackend, import_problem
from wsam_fused.tensor_list import TensorList

# More than one, so that programs share the chunks of a list and one of them is the last.
PROGRAMS = 4


class InterpretedBackend(TritonBackend):
    """The GPU operations over parameters on the CPU, program after program."""

    DEVICE_TYPES = ("cpu",)

    def unavailable(self) -> str | None:
        if torch.cuda.is_available():
            return "the kernels are compiled for the GPU instead"
        return import_problem() or _interpreter_problem()

    def device_problem(self, device: torch.device) -> str | None:
        return None

    @contextmanager
    def on_device(self, device: torch.device) -> Iterator[None]:
        with (
            _interpreting(),
            _patched_once(),
            _rounding_bfloat16(),
            np.errstate(all="ignore"),
            warnings.catch_warnings(),
        ):
            # NumPy warns of infinities and NaN, which the kernels choose away afterwards, and of
            # how Triton 3.6 converts its scalars.
            warnings.filterwarnings("ignore", "Conversion of an array", DeprecationWarning)
            yield

    def programs(self, tensors: TensorList, per_processor: int) -> int:
        assert tensors.table is not None
        return min(tensors.table.chunks.shape[0], PROGRAMS)


@cache
def interpreted_backend() -> InterpretedBackend:
    """Return the backend, with kernels that are interpreted if there is no GPU to run them on.

    Raises:
        RuntimeError: Triton has been imported; it decides then whether it interprets.
    """
    if not torch.cuda.is_available():
        if "triton" in sys.modules:
            raise RuntimeError("triton was imported before it could be told to interpret")
        with _interpreting():
            import_problem()
    return InterpretedBackend()


def _interpreter_problem() -> str | None:
    found = import_module("triton").__version__
    if found.startswith("3.6.") and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        return f"the interpreter of triton {found} does not work with numpy {np.__version__}"
    return None


@contextmanager
def _interpreting() -> Iterator[None]:
    """Tell Triton to interpret, and not for longer: other tests start processes of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        yield


@contextmanager
def _rounding_bfloat16() -> Iterator[None]:
    """Round float32 to the nearest bfloat16, as a GPU does: the interpreter cuts it."""
    interpreter: Any = import_module("triton.runtime.interpreter")
    names = import_module("triton.language")
    convert: Callable[..., Any] = interpreter._convert_float

    def rounding(values: Any, given: Any, wanted: Any, mode: Any) -> Any:
        if (given, wanted) == (names.bfloat16, names.float32):
            return np.asarray(values).astype(np.uint32) << 16
        if (given, wanted) == (names.float32, names.bfloat16):
            bits = np.ascontiguousarray(values).view(np.uint32).reshape(np.shape(values))
            to_even = bits + 0x7FFF + (bits >> 16 & 1)
            rounded = np.where(np.isnan(values), bits | 0x00400000, to_even)
            return (rounded >> 16).astype(np.uint16)
        return convert(values, given, wanted, mode)

    interpreter._convert_float = rounding
    try:
        yield
    finally:
        interpreter._convert_float = convert


@contextmanager
def _patched_once() -> Iterator[None]:
    """Let a launch patch Triton's language once per module, not at every call of a function.

    The interpreter patches it again each time, a millisecond that changes nothing: most of the
    time of these tests (measured).
    """
    interpreter: Any = import_module("triton.runtime.interpreter")
    patch: Callable[[Any], Any] = interpreter._patch_lang
    seen: set[str] = set()

    def patch_first_time(function: Any) -> Any:
        if function.__module__ in seen:
            return SimpleNamespace(restore=lambda: None)
        seen.add(function.__module__)
        return patch(function)

    interpreter._patch_lang = patch_first_time
    try:
        yield
    finally:
        interpreter._patch_lang = patch
