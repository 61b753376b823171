"""The Triton kernels as a GPU would run them, compiled without one, and read.

What a GPU makes of the machine code, memory order above all, is not tested by this.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from compile_triton import ARCHITECTURES, ENTRIES
from machine_code import spills_in_loops

SCRIPT = Path(__file__).parent / "compile_triton.py"
PROCESSES = 2
# Bytes that may be saved outside of the loops over elements, where it happens once per chunk.
STACK = 64

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


def start(cache: Path, *arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache)}
    environment.pop("TRITON_INTERPRET", None)  # these tests are about the compiler
    places = [str(SCRIPT.parent.parent), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, places))
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def output(process: subprocess.Popen[str]) -> dict[str, Any]:
    text, _ = process.communicate()
    assert process.returncode == 0, "the compiler failed; its message is above"
    found: dict[str, Any] = json.loads(text)
    return found


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What was found in each kernel, by its name."""
    cache = tmp_path_factory.mktemp("triton")
    started = [start(cache, "kernels", str(i), str(PROCESSES)) for i in range(PROCESSES)]
    return {name: found for process in started for name, found in output(process).items()}


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_kernel(entry: Any, kernels: dict[str, dict[str, Any]]) -> None:
    found = kernels[entry.name]
    vectors = {"reduce": (1, 0), "perturb": (1, 1), "update": (3, 1)}[entry.module]
    assert len(found["loads"]) >= vectors[0], "memory is not read by vectors"
    assert len(found["stores"]) >= vectors[1], "memory is not written by vectors"
    widths = [access.split(".v")[1] for access in found["loads"] + found["stores"]]
    whole = {"2.b32"} if entry.has_half_vectors else {"4.b32", "2.b64"}
    assert whole & set(widths), "no vector is of 16 bytes"
    assert found["moves_between_threads"] == 0, "an element changes its thread"
    assert found["inexact"] == [], "an operation does not round to nearest"
    assert found["local_in_ptx"] == 0
    if "registers" in found:  # Triton brought its disassembler
        assert found["spills_in_loops"] == 0
        assert found["stack"] <= STACK


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_registers(
    architecture: int,
    kernels: dict[str, dict[str, Any]],
    record_property: Any,
) -> None:
    mine = {name: f for name, f in kernels.items() if name.startswith(f"sm_{architecture}-")}
    assert mine
    if not all("registers" in found for found in mine.values()):
        pytest.skip("this Triton has no disassembler")
    single = max(f["registers"] for name, f in mine.items() if "float64" not in name)
    double = max(f["registers"] for name, f in mine.items() if "float64" in name)
    for name, found in mine.items():
        registers = 8 * -(-found["registers"] // 8)  # a warp is given them by the eight
        assert registers * found["threads_per_processor"] <= 65536, f"{name}: not all fit at once"
    (version,) = {found["triton"] for found in mine.values()}
    record_property(
        "GPU check",
        f"Triton {version}, sm_{architecture}: {len(mine)} kernels compiled, no spills in loops; "
        f"at most {single} registers, float64 {double}",
    )


def test_no_number_is_compiled_into_a_kernel(tmp_path: Path) -> None:
    counts = output(start(tmp_path, "launches"))
    assert counts == {"_reduce_kernel": 1, "_perturb_kernel": 1, "_update_kernel": 1}


def test_a_spill_in_a_loop_is_found() -> None:
    loop = """
        /*0010*/ STL [R1], R0 ;
        /*0020*/ LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0030*/ {spill}
        /*0040*/ STG.E.128 desc[UR4][R2.64], R4 ;
        /*0050*/ @P0 BRA 0x20 ;
        /*0060*/ LDL R0, [R1] ;
        /*0070*/ @P1 BRA 0x10 ;
    """
    assert spills_in_loops(loop.format(spill="LDL R9, [R1+0x8] ;")) == 1
    assert spills_in_loops(loop.format(spill="FADD R4, R4, R9 ;")) == 0
    assert spills_in_loops("/*0010*/ EXIT ;") is None
