"""The machine code of the CPU loops: a loop that silently lost its vectors would still be right."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import wsam_fused
from wsam_fused import _extension

pytestmark = [
    pytest.mark.skipif(_extension.UNAVAILABLE is not None, reason=str(_extension.UNAVAILABLE)),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="looks for x86 instructions"),
    pytest.mark.skipif(shutil.which("objdump") is None, reason="objdump is not installed"),
]

LOOP = re.compile(r"^[0-9a-f]+ <(.*CompiledLoop<.*::(?:avx2|avx512)\(.*)>:$")
PACKED = re.compile(r"\bv\w+p[sd]\s.*%[yz]mm")  # on a 256- or 512-bit register


def loops() -> dict[str, str]:
    """Disassembly of every loop that is compiled for a vector instruction set, by its name."""
    library = next(Path(wsam_fused.__file__).parent.glob("_C*.so"))
    text = subprocess.run(
        ["objdump", "-d", "-C", "--no-show-raw-insn", str(library)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    found: dict[str, str] = {}
    name = None
    for line in text.splitlines():
        if line.endswith(">:"):
            match = LOOP.match(line)
            name = match.group(1) if match else None
        elif name is not None:
            found[name] = found.get(name, "") + line + "\n"
    return found


def test_every_loop_computes_in_vectors() -> None:
    code = loops()
    # reduce: 4 pairings; from w: 4 directions, without a copy and with one; from another point: 1,
    # and 3 with a copy; restore: 2; update: 5 rules. 2 dtypes, 2 instruction sets. To and from 2
    # dtypes of 16 bits, and to one of them by chance.
    assert len(code) == (4 + 4 + 4 + 1 + 3 + 2 + 5) * 2 * 2 + (2 + 2 + 1) * 2
    copies_only = re.compile(r"RestoreLoop<\w+, true>")
    arithmetic = re.compile(r"\bv(?:fn?madd|mul|add|sub|div|sqrt)\w*p[sd]\s.*%[yz]mm")
    on_bits = re.compile(r"\bvp(?:add|sub|sll|srl|and|or|mull|mov[sz]x)\w*\s.*%[yz]mm")
    for name, text in code.items():
        wanted = PACKED if copies_only.search(name) else arithmetic
        if "WidenLoop" in name or "NarrowLoop" in name:
            wanted = on_bits
        # A copy may have become a call of memcpy or memmove.
        copied = copies_only.search(name) and re.search(r"(?:call|jmp).*mem(?:cpy|move)", text)
        assert copied or wanted.search(text), f"{name} is not vectorised"
        assert "fmaf" not in text, f"{name} calls the library for a multiply-add"
