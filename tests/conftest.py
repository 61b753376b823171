"""Seeds, thread counts and the backends that this machine has."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from wsam_fused.backends import BACKENDS

# The problems are tiny, and threads that wait for each other cost more than they compute.
torch.set_num_threads(1)

AVAILABLE = [name for name, backend in BACKENDS.items() if backend.unavailable() is None]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=AVAILABLE)
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend that can be used here, by name."""
    return str(request.param)


@pytest.fixture
def threads() -> Iterator[None]:
    """Puts the number of threads back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
