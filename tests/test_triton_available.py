"""When the Triton backend can be used, and what it says when it cannot."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from wsam_fused.backends import triton as backend_package


def test_importing_the_package_does_not_import_triton() -> None:
    code = "import wsam_fused, sys; assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("triton", "expected"),
    [
        (ModuleNotFoundError("no", name="triton"), "is not installed; run: pip install 'triton>="),
        (ModuleNotFoundError("no x", name="x"), "cannot be imported, install it again: .*no x"),
        (ImportError("broken"), "cannot be imported, install it again: ImportError: broken"),
        (SimpleNamespace(__version__="3.5.1"), "triton 3.5.1 is too old; run: pip install"),
        (SimpleNamespace(__version__="odd"), "triton odd is too old; run: pip install"),
        (SimpleNamespace(__version__="3.10.0"), None),
        (SimpleNamespace(__version__="4.0.0+git"), None),
    ],
)
def test_a_triton_that_cannot_be_used_is_named(
    triton: Any, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def imported(name: str) -> Any:
        if name != "triton":
            return import_module(name)
        if isinstance(triton, Exception):
            raise triton
        return triton

    monkeypatch.setattr(backend_package, "import_module", imported)
    reason = backend_package.import_problem.__wrapped__()
    if expected is None:
        assert reason is None
    else:
        with pytest.raises(AssertionError, match=expected):
            raise AssertionError(reason)


def test_a_missing_gpu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for version, expected in ((None, "install a CUDA build"), ("13.0", "nvidia-smi")):
        monkeypatch.setattr(torch.version, "cuda", version)
        reason = backend_package.TRITON.unavailable()
        assert reason is not None
        assert expected in reason
