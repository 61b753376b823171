"""Fixtures of the tests that mutants are given to: of ``tests/conftest.py``, what is quick to load.

Two backends are enough, the reference and the kernels that it is compared with.
"""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=["eager", "cpu"])
def backend(request: pytest.FixtureRequest) -> str:
    """The name of a backend."""
    return str(request.param)


@pytest.fixture
def threads() -> None:
    """One thread always."""
