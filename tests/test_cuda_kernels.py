"""The compiled CUDA kernels, read without a GPU: architectures, registers, spills, vector access.

A kernel that spilled or lost its vectors would still be right, only slow.
"""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest
from machine_code import vectors_in_flight

import wsam_fused

ARCHITECTURES = ("80", "90", "100", "120")
# Parameters and gradients: see with_dtypes in csrc/cuda/operations.h.
PAIRS = 6
TYPES = 4
RULES = 5
RULES_WITH_STATES = 3
GEOMETRIES = 3
LOW = 2
# Half of the 2,048 threads that a multiprocessor of an A100, H100 or B200 holds: 65,536 registers.
HALF_OCCUPANCY = 64
# What a thread asks for before it waits: the gradients and w, and one or both states.
IN_FLIGHT = {
    "reduce": 2,
    "Perturb": 2,
    **{f"(wsam_fused::BaseRule){rule}": count for rule, count in enumerate((3, 3, 4, 5, 5))},
}


# With two states of 16 bits a vector has four elements: for eight there are too few registers.
HALF_VECTORS = re.compile(r"Update<(c10::\w+), \1, \1, \1, \(wsam_fused::BaseRule\)[34]>")
# Reads vectors of float32 weights and writes as many parameters of 16 bits.
HALF_STORES = re.compile(r"Perturb<(c10::\w+), float, \1,")


def library() -> Path | None:
    return next(Path(wsam_fused.__file__).parent.glob("_cuda*.so"), None)


def nvcc() -> str | None:
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def cuobjdump() -> str | None:
    """That of a CUDA toolkit, else the one that Triton brings."""
    found = shutil.which("cuobjdump") or shutil.which("cuobjdump", path="/usr/local/cuda/bin")
    spec = find_spec("triton")
    if found is None and spec is not None and spec.origin is not None:
        bundled = Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump"
        found = str(bundled) if bundled.exists() else None
    return found


needs_library = pytest.mark.skipif(library() is None, reason="the CUDA kernels are not built")
needs_disassembler = pytest.mark.skipif(cuobjdump() is None, reason="there is no cuobjdump")


@functools.cache
def dump(*options: str) -> str:
    tool, file = cuobjdump(), library()
    assert tool is not None
    assert file is not None
    command = [tool, *options, str(file)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return subprocess.run(
        ["c++filt"], input=text, capture_output=True, text=True, check=True
    ).stdout


class Kernel(NamedTuple):
    architecture: str
    name: str
    registers: int
    stack: int
    local: int


def kernels() -> list[Kernel]:
    found, architecture, name = [], "", ""
    for line in dump("-res-usage").splitlines():
        if match := re.match(r"arch = sm_(\w+)", line):
            architecture = match.group(1)
        elif match := re.match(r"\s*Function (.*):$", line):
            name = match.group(1)
        elif match := re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", line):
            found.append(Kernel(architecture, name, *map(int, match.groups())))
    return [kernel for kernel in found if "_kernel<" in kernel.name]


@functools.cache
def machine_code(architecture: str) -> dict[str, str]:
    """SASS of every kernel, by its name."""
    code: dict[str, list[str]] = defaultdict(list)
    name = ""
    for line in dump("-sass", "-arch", f"sm_{architecture}").splitlines():
        if match := re.match(r"\s*Function : (.*)$", line):
            name = match.group(1)
        elif re.match(r"\s*/\*[0-9a-f]{4,}\*/", line):
            code[name].append(line)
    return {name: "\n".join(lines) for name, lines in code.items() if "_kernel<" in name}


@pytest.mark.skipif(nvcc() is None, reason="there is no nvcc")
def test_the_kernels_are_built_wherever_there_is_a_compiler() -> None:
    assert library() is not None


@needs_library
@needs_disassembler
def test_every_architecture_has_every_kernel() -> None:
    count = defaultdict(int)
    for kernel in kernels():
        count[kernel.architecture] += 1
    # reduce: three for each type of gradient, an adaptive one for each pair.
    reduce = 3 * TYPES + PAIRS
    perturb = GEOMETRIES * PAIRS + TYPES  # and noise for each type of parameter
    perturb += LOW * (GEOMETRIES + 1)  # from float32 weights
    update = PAIRS * RULES
    update += LOW * (RULES + 2 * RULES_WITH_STATES)  # with these, and with states of 16 bits
    expected = reduce + perturb + update
    assert {"90"} <= set(count) <= set(ARCHITECTURES)
    assert set(count.values()) == {expected}
    assert "PTX" in dump("-lptx"), "a newer architecture could not compile its own code"


@needs_library
@needs_disassembler
def test_nothing_spills_and_half_of_the_threads_fit(record_property: object) -> None:
    worst: dict[tuple[str, bool], int] = defaultdict(int)
    for kernel in kernels():
        what = f"{kernel.name} on sm_{kernel.architecture}"
        assert kernel.stack == 0, f"{what} has a stack of {kernel.stack} bytes"
        assert kernel.local == 0, f"{what} has {kernel.local} bytes of local memory"
        double = "<double, double" in kernel.name
        assert double or kernel.registers <= HALF_OCCUPANCY, f"{what}: {kernel.registers} registers"
        key = (kernel.architecture, double)
        worst[key] = max(worst[key], kernel.registers)
    for architecture in sorted({kernel.architecture for kernel in kernels()}, key=int):
        mine = [kernel for kernel in kernels() if kernel.architecture == architecture]
        record_property(  # type: ignore[operator]
            "GPU check",
            f"CUDA, sm_{architecture}: {len(mine)} kernels compiled, no spills, no local memory; "
            f"at most {worst[architecture, False]} registers, float64 {worst[architecture, True]}",
        )


@needs_library
@needs_disassembler
@pytest.mark.parametrize("architecture", ["80", "90"])
def test_hot_kernels_move_vectors_of_16_bytes(architecture: str, record_property: object) -> None:
    if all(kernel.architecture != architecture for kernel in kernels()):
        pytest.skip(f"the library is not built for sm_{architecture}")
    code = machine_code(architecture)
    assert code
    loads = stores = 0
    for name, text in code.items():
        assert not re.search(r"\b(?:LDL|STL)\b", text), f"{name} uses local memory"
        # Addresses come from a table: a generic access would mean that nobody told the compiler.
        assert not re.search(r"\b(?:LD|ST)\.E\b", text), f"{name} has generic accesses"
        (wanted,) = [count for kind, count in IN_FLIGHT.items() if kind in name]
        bits = 64 if HALF_VECTORS.search(name) else 128
        stored_bits = 64 if HALF_STORES.search(name) else bits
        assert re.search(rf"\bLDG\.E\.{bits}\b", text), f"{name} loads no vectors of {bits} bits"
        loads += len(re.findall(r"\bLDG\.E\.128\b", text))
        found = re.search(rf"\bSTG\.E\.{stored_bits}\b", text)
        assert found or "reduce_kernel" in name, f"{name} stores no vectors of {stored_bits} bits"
        stores += len(re.findall(r"\bSTG\.E\.128\b", text))
        assert vectors_in_flight(text, bits) >= wanted, f"{name} waits between loads"
    record_property(  # type: ignore[operator]
        "GPU check",
        f"CUDA, sm_{architecture}: {loads} loads and {stores} stores of 16 bytes in "
        f"{len(code)} kernels, none generic or local, no waiting between the loads of a vector",
    )
