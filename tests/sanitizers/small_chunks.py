"""A plugin of pytest: small chunks, so that the tests' tensors are shared by several threads."""

from __future__ import annotations


def pytest_sessionstart() -> None:
    """Lower the number of elements that one thread steps; two blocks of 16-bit numbers are left."""
    from wsam_fused.backends import native

    native.CPU_CHUNK_SIZE = 1024
