"""Reads the machine code of a GPU kernel, as cuobjdump prints it."""

from __future__ import annotations

import re

_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?(.*?);", re.MULTILINE)
_CONTROL = re.compile(r"(?:BRA|BRX|BSYNC|BAR|CALL|EXIT|RET|WARPSYNC)\b")
# How numbers of 16 bits become float32.
_UNPACK = re.compile(r"(?:PRMT|HADD2\.F32|IMAD\.U32)\b")
_VECTOR_LOAD = re.compile(r"LDG\.E\.(?:\w+\.)*?(64|128)\b(?:\.\w+)* R(\d+)")


def _instructions(code: str) -> list[tuple[int, str]]:
    return [(int(address, 16), text) for address, text in _INSTRUCTION.findall(code)]


def spills_in_loops(code: str) -> int | None:
    """Count accesses to the stack in the loops that move vectors; None if there is no such loop.

    A loop is what a branch back to an earlier address encloses. Only the innermost ones are hot:
    those around them run once per chunk or per tensor.
    """
    found = _instructions(code)
    loops = []
    for address, text in found:
        jump = re.match(r"BRA(?:\.\w+)* .*?0x([0-9a-f]+)", text)
        if jump and int(jump.group(1), 16) < address:
            loops.append((int(jump.group(1), 16), address))
    inner = [
        (begin, end)
        for begin, end in loops
        if not any((b, e) != (begin, end) and begin <= b and e <= end for b, e in loops)
    ]
    bodies = [[text for address, text in found if b <= address <= e] for b, e in inner]
    moving = [body for body in bodies if any(map(_VECTOR_LOAD.match, body))]
    if not moving:
        return None
    return sum(bool(re.match(r"(?:LDL|STL)\b", text)) for body in moving for text in body)


def vectors_in_flight(code: str, bits: int = 128) -> int:
    """Count the vectors that a thread asks for before it waits for the first of them.

    That is the most of all pieces of code without a branch; only those with a vector of 16 bytes
    count, because single addresses are read as vectors of 8. If ``bits`` is 64, only those whose
    first vector is unpacked.
    """
    most = 0
    pending: list[set[int]] = []
    widest = 0
    for _, text in _instructions(code):
        load = _VECTOR_LOAD.match(text)
        registers = set(map(int, re.findall(r"\bR(\d+)\b", text)))
        if load:
            registers.discard(int(load.group(2)))
        waits = any(registers & waited for waited in pending)
        if waits and bits == 64 and _UNPACK.match(text):
            most = max(most, len(pending))
        if _CONTROL.match(text) or waits:
            pending, widest = [], 0
        if load:
            size, first = map(int, load.groups())
            pending.append(set(range(first, first + size // 32)))
            widest = max(widest, size)
            if widest == bits == 128:
                most = max(most, len(pending))
    return most
