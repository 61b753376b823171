"""Calls native entry points with right and damaged arguments, in a process that may crash.

``python tests/native_fuzz.py TARGET FIRST CASES SECONDS FILE`` makes the calls of the seeds from
FIRST on, writes each seed and its counts into FILE before the call, and prints what it finds. A
seed that crashes the process is thus known: :func:`fuzz` notes it and goes on behind it.
"""

from __future__ import annotations

import faulthandler
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from native_calls import Call, random_call
from native_damages import OF_ARGUMENTS, OF_TABLES, damage
from native_reader import check_reader

EXPECTED_ERRORS = (RuntimeError, TypeError, ValueError, NotImplementedError, IndexError)
DAMAGED = 0.85  # share of the calls
MOST_CRASHES = 20


@dataclass
class Findings:
    """What a number of calls have done.

    Attributes:
        cases: Calls made.
        accepted: Those that were right and were carried out.
        refused: Those that were wrong and raised.
        crashes: What ended the process, with the seed.
        corruptions: What was written, or not refused, and should not have been.
    """

    cases: int = 0
    accepted: int = 0
    refused: int = 0
    crashes: list[str] = field(default_factory=list)
    corruptions: list[str] = field(default_factory=list)


def check_operation(seed: int, emulated: bool) -> bool:
    """Make one call of an operation; return whether it was carried out.

    Raises:
        AssertionError: It did what it should not.
    """
    rng = random.Random(seed)
    lower = (torch.float32, torch.bfloat16, torch.float16)
    call = random_call(rng, lambda p: lower if emulated and p == torch.float32 else (p,))
    if rng.random() < DAMAGED:
        # A GPU's operations cannot read their tables to check them.
        damage(call, rng, OF_ARGUMENTS if emulated else OF_ARGUMENTS + OF_TABLES)
    library = torch.ops.wsam_fused_emulated if emulated else torch.ops.wsam_fused
    operation = getattr(library, call.operation).default
    blocks = [call.memory.bytes, *call.other_memory]
    before = [block.clone() for block in blocks]
    try:
        operation(*call.arguments.values())
    except EXPECTED_ERRORS as error:
        assert call.damages, f"a right call of {call.operation} raised {error}"
        assert str(error), f"no message for {call.damages}"
        kept = all(torch.equal(a, b) for a, b in zip(blocks, before, strict=True))
        assert kept, f"{call.operation} wrote before it raised, {call.damages}: {error}"
        return False
    assert not call.damages, f"{call.operation} did not refuse {call.damages}"
    _check_writes(call, before[0])
    return True


def _check_writes(call: Call, before: torch.Tensor) -> None:
    changed = call.memory.bytes != before
    for begin, end in call.written:
        changed[begin:end] = False
    first = int(changed.nonzero()[0]) if bool(changed.any()) else None
    assert first is None, f"{call.operation} wrote to byte {first}, which is none of its operands'"


def fail_on_purpose(seed: int) -> bool:
    """Crash at seed 3 and be wrong at seed 5, for the test that such things are found."""
    if seed == 3:
        os.kill(os.getpid(), signal.SIGSEGV)
    assert seed != 5, "wrong on purpose"
    return True


TARGETS: dict[str, Callable[[int], bool]] = {
    "cpu": lambda seed: check_operation(seed, emulated=False),
    "cuda-emulated": lambda seed: check_operation(seed, emulated=True),
    "reader": check_reader,
    "on-purpose": fail_on_purpose,
}


def make_calls(target: str, first: int, cases: int, seconds: float, file: Path) -> None:
    """Make the calls of some seeds, until there is no time left."""
    check = TARGETS[target]
    counts = [first, 0, 0]  # the seed, accepted, refused
    end = time.monotonic() + seconds
    with file.open("r+b", buffering=0) as progress:
        for seed in range(first, first + cases):
            counts[0] = seed
            _write(progress, counts)
            try:
                counts[1 if check(seed) else 2] += 1
            except AssertionError as error:
                print(json.dumps(f"{target}, seed {seed}: {error}"), flush=True)
            if time.monotonic() > end:
                break
        _write(progress, counts)


def _write(progress: FileIO, counts: Sequence[int]) -> None:
    progress.seek(0)
    progress.write(b"%20d %20d %20d" % tuple(counts))


def fuzz(target: str, first: int, cases: int, seconds: float) -> Findings:
    """Make the calls of the seeds from ``first`` on in processes of their own.

    Args:
        target: One of ``TARGETS``.
        first: The first seed.
        cases: How many calls.
        seconds: After which no further call is made.

    Raises:
        RuntimeError: The process ended otherwise than by a crash: these files are wrong.
    """
    found = Findings()
    end = time.monotonic() + seconds
    # The package and these files, wherever this process has them from.
    paths = [str(Path(path).absolute()) for path in sys.path]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    with tempfile.TemporaryDirectory() as folder:
        progress = Path(folder) / "seed"
        while found.cases < cases and len(found.crashes) < MOST_CRASHES:
            seed = first + found.cases
            progress.write_bytes(b"%d 0 0" % (seed - 1))
            left = end - time.monotonic()
            if left <= 0:
                break
            numbers = [seed, cases - found.cases, left]
            command = [sys.executable, __file__, target, *map(str, numbers), str(progress)]
            run = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=left + 120
            )
            reached, accepted, refused = map(int, progress.read_bytes().split())
            if run.returncode > 0 or reached < seed:
                raise RuntimeError(f"{target}, seed {reached}: {run.stderr}")
            found.cases += reached - seed + 1
            found.accepted += accepted
            found.refused += refused
            found.corruptions += map(json.loads, run.stdout.splitlines())
            if run.returncode == 0:
                break
            ended = f"{target}, seed {reached}: {signal.Signals(-run.returncode).name}"
            found.crashes.append(f"{ended}\n{run.stderr[-2000:]}")
    return found


def main(arguments: list[str]) -> None:
    """Make the calls that the command line says."""
    target, first, cases, seconds, file = arguments
    faulthandler.enable()
    torch.set_num_threads(1)
    _load(target)
    make_calls(target, int(first), int(cases), float(seconds), Path(file))


def _load(target: str) -> None:
    from wsam_fused import _extension

    reason: Any = _extension.UNAVAILABLE
    if target == "cuda-emulated":
        from emulated import build

        reason = build()
    if reason is not None:
        raise RuntimeError(reason)


if __name__ == "__main__":
    main(sys.argv[1:])
