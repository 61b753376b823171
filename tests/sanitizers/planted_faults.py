"""Faults that are planted are found: .ci/sanitize runs this before it believes a clean run.

Not part of ``make test``: an extension without a sanitizer would write where it must not.
"""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

FLAGS = os.environ.get("WSAM_FUSED_CXXFLAGS", "")
FOUND = {
    "too-long": "AddressSanitizer: heap-buffer-overflow",
    "misaligned": "misaligned address",
    "far-away": "signed integer overflow",
}
THREADS_FOUND = {"shared": "ThreadSanitizer: data race"}


@cache
def planted(fault: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the script, with the report on standard error."""
    options = {
        name: f"{os.environ.get(name, '')}:log_path=stderr"
        for name in ("ASAN_OPTIONS", "UBSAN_OPTIONS", "TSAN_OPTIONS")
    }
    script = Path(__file__).with_name("planted_fault.py")
    return subprocess.run(
        [sys.executable, str(script), fault, *arguments],
        env={**os.environ, **options, "PYTHONPATH": os.getcwd()},
        capture_output=True,
        text=True,
    )


def arguments() -> list[tuple[str, str, tuple[str, ...]]]:
    """Return each fault that this build has to find, the report, and in which kernels."""
    if "thread" in FLAGS:
        return [(fault, text, ()) for fault, text in THREADS_FOUND.items()]
    kernels: list[tuple[str, ...]] = [(), ("--emulated",)]
    return [(fault, text, which) for fault, text in FOUND.items() for which in kernels]


@pytest.mark.parametrize(("fault", "report", "kernels"), arguments())
def test_a_planted_fault_ends_the_process(
    fault: str, report: str, kernels: tuple[str, ...]
) -> None:
    assert "-fsanitize=" in FLAGS, "WSAM_FUSED_CXXFLAGS has no sanitizer"
    sound = planted("none", *kernels)
    assert (sound.returncode, sound.stdout) == (0, "nothing was noticed\n"), sound.stderr
    run = planted(fault, *kernels)
    assert run.returncode != 0
    assert report in run.stderr
    assert "csrc/" in run.stderr, "the report does not name the line"
