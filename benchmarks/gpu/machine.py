"""What the GPU report says of the machine, its software and its folder."""

from __future__ import annotations

import datetime
import platform
import re
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import device_name, git_hash, source_hash

# Of a device's name: who makes it, and all from the size of its memory on.
_MAKERS = {"nvidia", "geforce", "amd", "radeon", "instinct"}
_MEMORY = re.compile(r"\d+gb")


def slug(device: str) -> str:
    """Return a short name for files: ``h100`` for ``NVIDIA H100 80GB HBM3``."""
    kept: list[str] = []
    for word in re.findall(r"[a-z0-9]+", device.lower()):
        if _MEMORY.fullmatch(word):
            break
        if word not in _MAKERS:
            kept.append(word)
    return "-".join(kept) or "unknown"


def label(device: torch.device) -> str:
    """Name what is measured."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device_name()


def describe(device: torch.device, command: str) -> dict[str, Any]:
    """Return what is the same for a whole run.

    Args:
        device: What is measured.
        command: The command line.
    """
    found: dict[str, Any] = {
        "torch": torch.__version__,
        "triton": _package("triton"),
        "cuda": torch.version.cuda or "none",
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "nvcc": _release(_output(nvcc(), "--version")),
        "python": platform.python_version(),
        "git": git_hash(),
        "source": source_hash(),
        "date": datetime.date.today().isoformat(),
        "command": command,
    }
    if device.type != "cuda":
        return {"device": label(device), "slug": "dry-run", "timer": "wall clock", **found}
    of_device = torch.cuda.get_device_properties(device)
    return {
        "device": label(device),
        "slug": slug(label(device)),
        "timer": "CUDA events",
        "capability": f"{of_device.major}.{of_device.minor}",
        "memory_gib": of_device.total_memory / 2**30,
        "l2_mib": of_device.L2_cache_size / 2**20,
        "multiprocessors": of_device.multi_processor_count,
        **found,
    }


def nvcc() -> str:
    """Return the compiler's path: that of PATH, else that of the place it is installed to."""
    from torch.utils.cpp_extension import CUDA_HOME

    return shutil.which("nvcc") or str(Path(CUDA_HOME or "/usr/local/cuda") / "bin" / "nvcc")


def _package(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"


def _output(*command: str) -> str:
    try:
        run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return "none"
    return run.stdout.strip()


def _release(text: str) -> str:
    match = re.search(r"release ([\d.]+)", text)
    return match.group(1) if match else "none"
