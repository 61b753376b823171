"""Print which backends there are, which one is chosen for what, and why not another.

python -m wsam_fused
"""

from __future__ import annotations

import argparse
import os
import platform
from importlib import metadata

import torch

from wsam_fused import __version__, _extension
from wsam_fused.backends import BACKENDS, select
from wsam_fused.methods import METHODS

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _devices() -> list[torch.device]:
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices += [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return devices


def _triton_version() -> str:
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        return "not installed"


def _table(rows: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def report() -> str:
    """Return the tables that the command prints."""
    versions: list[tuple[str, ...]] = [
        ("wsam_fused", __version__),
        ("torch", torch.__version__),
        ("python", platform.python_version()),
        ("machine", f"{platform.machine()}, {torch.get_num_threads()} threads"),
        ("CUDA of torch", str(torch.version.cuda)),
        ("triton", _triton_version()),
        ("CPU kernels", _extension.cpu_instruction_set()),
        ("CUDA kernels", _extension.cuda_architectures()),
        ("WSAM_FUSED_CPU_ISA", os.environ.get("WSAM_FUSED_CPU_ISA", "not set")),
        ("methods", ", ".join(method.__name__ for method in METHODS)),
    ]
    backends: list[tuple[str, ...]] = [("backend", "available")]
    backends += [(name, backend.unavailable() or "yes") for name, backend in BACKENDS.items()]
    chosen: list[tuple[str, ...]] = [("device", "dtype", 'backend="auto"', "why")]
    for device in _devices():
        for dtype in _DTYPES:
            choice = select("auto", device, dtype)
            chosen.append((str(device), str(dtype).removeprefix("torch."), *choice))
    tables: tuple[list[tuple[str, ...]], ...] = (versions, backends, chosen)
    return "\n\n".join(_table(table) for table in tables)


def main() -> None:
    """Run the command line."""
    argparse.ArgumentParser(
        prog="python -m wsam_fused",
        description="Print the available backends, versions, and which backend is chosen for "
        "which device and dtype, with the reason.",
        epilog="WSAM_FUSED_CPU_ISA=baseline, avx2 or avx512 limits the instruction set of the "
        "CPU kernels.",
    ).parse_args()
    print(report())


if __name__ == "__main__":
    main()
