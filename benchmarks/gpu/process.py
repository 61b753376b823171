"""Measures in a process of its own: one that fails may leave the device unusable behind it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks.common import ROOT
from benchmarks.gpu.notes import FAILED


def json_of(module: Sequence[str], limit_s: float) -> dict[str, Any]:
    """Run a module with arguments and return the JSON of the last line that it prints.

    Args:
        module: Its name and the arguments.
        limit_s: The process is ended after that many seconds.

    Returns:
        What it printed, or ``note`` with the reason why it printed nothing.
    """
    command = [sys.executable, "-m", *module]
    try:
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit_s)
    except subprocess.TimeoutExpired:
        return {"note": f"{FAILED}did not end in {limit_s:g} s"}
    try:
        found: dict[str, Any] = json.loads(run.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError):
        lines = run.stderr.strip().splitlines() or [f"exit code {run.returncode}"]
        return {"note": f"{FAILED}{lines[-1][:160]}"}
    return found
