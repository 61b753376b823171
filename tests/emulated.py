"""The CUDA kernels, compiled for the CPU (tests/emulation): a backend for the tests."""

from __future__ import annotations

import hashlib
import os
import shlex
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.utils.cpp_extension import get_cxx_compiler, include_paths, library_paths

from wsam_fused.backends import gpu
from wsam_fused.backends.native import NativeBackend

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "tests" / "emulation" / "emulated.cpp"
HEADERS = [*sorted(SOURCE.parent.glob("*.h")), *sorted((ROOT / "csrc").rglob("*.*h"))]
FLAGS = [
    "-std=c++17",
    "-O1",
    "-U_FORTIFY_SOURCE",  # which takes a jump to another stack for an attack
    "-shared",
    "-fPIC",
    "-ffp-contract=off",
    "-DTORCH_TARGET_VERSION=0x020b000000000000",
    "-DTORCH_STABLE_ONLY",
    *shlex.split(os.environ.get("WSAM_FUSED_CXXFLAGS", "")),
]


@cache
def build() -> str | None:
    """Compile and load the library, or return why that is not possible."""
    digest = hashlib.sha256(" ".join([torch.__version__, *FLAGS]).encode())
    for path in [SOURCE, *HEADERS]:
        digest.update(path.read_bytes())
    library = ROOT / "build" / f"emulated-{digest.hexdigest()[:12]}.so"
    if not library.exists():
        library.parent.mkdir(exist_ok=True)
        includes = [f"-I{path}" for path in [str(ROOT / "csrc"), *include_paths()]]
        links = [f"-L{path}" for path in library_paths()] + ["-ltorch", "-ltorch_cpu", "-lc10"]
        # A sanitizer that is loaded first looks at this process, not at the compiler.
        environment = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
        command = [get_cxx_compiler(), *FLAGS, *includes, str(SOURCE), *links, "-o", str(library)]
        try:
            run = subprocess.run(command, capture_output=True, text=True, env=environment)
        except FileNotFoundError as error:
            return str(error)
        assert run.returncode == 0, run.stderr
    torch.ops.load_library(str(library))
    return None


class EmulatedBackend(NativeBackend):
    """The GPU operations over parameters on the CPU."""

    def __init__(self) -> None:
        super().__init__("cpu", gpu.DTYPES, gpu.GRADIENT_DTYPES)

    @property
    def _operations(self) -> Any:
        return torch.ops.wsam_fused_emulated

    def unavailable(self) -> str | None:
        return build()

    def chunk_size(self, total: int) -> int:
        return gpu.chunk_size(total)
