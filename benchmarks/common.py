"""Shape lists, the description of the machine, and the schema of the result files."""

from __future__ import annotations

import csv
import datetime
import hashlib
import math
import os
import platform
import statistics
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"

# A round in which other processes use more of the cores is not quiet.
QUIET_SHARE = 0.05

Shape = tuple[int, ...]
Row = dict[str, str]

# Where a row comes from: the last columns of every result file.
PROVENANCE = ("device", "torch", "git", "source", "date", "command")
FIELDS = (
    "operation",
    "method",
    "base",
    "contender",
    "dtype",
    "shapes",
    "tensors",
    "parameters",
    "median_ms",
    "p20_ms",
    "p80_ms",
    "min_ms",
    "max_ms",
    "ratio_to_ours",
    "ratio_to_plain",
    "gb_per_s",
    "share_of_stream",
    "moved_per_parameter",
    "compile_s",
    "peak_extra_copies",
    "state_extra_copies",
    "rounds",
    "others_cpu",
    "note",
    *PROVENANCE,
)
# Two rows with equal values here are two measurements of one thing.
KEY = ("operation", "base", "contender", "dtype", "shapes")
# Rows that differ here cannot stand in one table.
ENVIRONMENT = ("device", "torch", "source")


# ---- shape lists -----------------------------------------------------------------------------


def _resnet18() -> Iterator[Shape]:
    """The 62 parameters of torchvision's ResNet-18 for 1000 classes, in its order."""

    def convolution(out: int, into: int, size: int) -> Iterator[Shape]:
        yield (out, into, size, size)
        yield from ((out,), (out,))  # weight and bias of the normalization behind it

    yield from convolution(64, 3, 7)
    into = 64
    for width in (64, 128, 256, 512):
        for block in range(2):
            yield from convolution(width, into, 3)
            yield from convolution(width, width, 3)
            if block == 0 and into != width:
                yield from convolution(width, into, 1)  # the shortcut changes the width
            into = width
    yield from ((1000, 512), (1000,))


def _gpt2_small() -> Iterator[Shape]:
    """The 148 parameters of GPT-2 (124 M); the output layer is the tied embedding."""
    vocabulary, context, width, layers = 50257, 1024, 768, 12
    yield from ((vocabulary, width), (context, width))
    for _ in range(layers):
        yield from ((width,), (width,))
        yield from ((width, 3 * width), (3 * width,))
        yield from ((width, width), (width,))
        yield from ((width,), (width,))
        yield from ((width, 4 * width), (4 * width,))
        yield from ((4 * width, width), (width,))
    yield from ((width,), (width,))


def _llama_1b() -> Iterator[Shape]:
    """The 146 parameters of Llama-3.2-1B (1.2 G); the output layer is the tied embedding."""
    vocabulary, width, layers, heads, key_value_heads, hidden = 128256, 2048, 16, 32, 8, 8192
    key_value_width = width // heads * key_value_heads
    yield (vocabulary, width)
    for _ in range(layers):
        yield from ((width, width), (key_value_width, width), (key_value_width, width))
        yield (width, width)
        yield from ((hidden, width), (hidden, width), (width, hidden))
        yield from ((width,), (width,))  # the normalizations before attention and before the MLP
    yield (width,)


_MODELS = {"resnet18": _resnet18, "gpt2-small": _gpt2_small, "llama-1b": _llama_1b}
FULL = ("8x4096x1024", "resnet18", "gpt2-small", "2000x64")
QUICK = ("8x512x512", "200x64")
GPU = ("8x4096x1024", "resnet18", "gpt2-small", "llama-1b", "2000x64")


def shapes_of(name: str) -> list[Shape]:
    """Return the shapes of a list.

    Args:
        name: A model's name, or ``COUNTxSIZE[xSIZE...]`` for equal tensors: ``8x4096x1024``.

    Raises:
        ValueError: The name is neither.
    """
    if name in _MODELS:
        return list(_MODELS[name]())
    parts = name.split("x")
    if len(parts) < 2 or not all(part.isdigit() and int(part) > 0 for part in parts):
        known = ", ".join(_MODELS)
        raise ValueError(f"shapes is {name!r}, expected {known} or COUNTxSIZE[xSIZE...]")
    count, *shape = map(int, parts)
    return [tuple(shape)] * count


def count_of(shapes: Sequence[Shape]) -> int:
    """Return the number of parameters."""
    return sum(math.prod(shape) for shape in shapes)


# ---- machine ---------------------------------------------------------------------------------


@cache
def device_name() -> str:
    """Name the processor, its cores, and what torch makes of them."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    has_affinity = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count()
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{name}, {cores} cores, {torch.get_num_threads()} threads, {capability}"


@cache
def git_hash() -> str:
    """Return the commit, marked if the work tree differs from it."""
    try:
        head = _git("rev-parse", "--short", "HEAD")
        return head + ("-modified" if _git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "no commit"


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@cache
def source_hash() -> str:
    """Return a hash of everything that decides what our step does."""
    files = [ROOT / "setup.py"]
    files += [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    files += (ROOT / "wsam_fused").rglob("*.py")
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def environment(command: str) -> Row:
    """Return the columns that are the same in all rows of a run."""
    return {
        "device": device_name(),
        "torch": torch.__version__,
        "git": git_hash(),
        "source": source_hash(),
        "date": datetime.date.today().isoformat(),
        "command": command,
    }


# ---- numbers and files -----------------------------------------------------------------------


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return median, 20th and 80th percentile, minimum and maximum."""
    if len(values) < 2:
        fifths = list(values) * 4
    else:
        fifths = statistics.quantiles(values, n=5, method="inclusive")
    return {
        "median_ms": statistics.median(values),
        "p20_ms": fifths[0],
        "p80_ms": fifths[3],
        "min_ms": min(values),
        "max_ms": max(values),
    }


def paired(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """Return the median over rounds of the quotient inside a round.

    The speed of a shared machine drifts by more than what is to be measured; inside a round it
    hardly does.
    """
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


def text(value: object) -> str:
    """Format a cell; floats with four digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def write_table(
    path: Path, fields: Sequence[str], rows: Sequence[Mapping[str, object]]
) -> list[Row]:
    """Write a result file, and return its rows as text."""
    cells = [{field: text(row.get(field, "")) for field in fields} for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fields, lineterminator="\n")
        writer.writeheader()
        writer.writerows(cells)
    return cells


def read_rows(path: Path) -> list[Row]:
    """Read a result file; none is an empty one."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_rows(path: Path, new: Sequence[Mapping[str, object]]) -> list[Row]:
    """Add rows to a result file and return all that it has now.

    Older measurements of the same thing are replaced, and so is every row of another machine,
    torch or source hash: a table never mixes them.
    """
    rows = [{field: text(row.get(field, "")) for field in FIELDS} for row in new]
    replaced = {tuple(row[field] for field in KEY) for row in rows}
    here = {tuple(row[field] for field in ENVIRONMENT) for row in rows}
    kept = [
        row
        for row in read_rows(path)
        if tuple(row.get(field) for field in ENVIRONMENT) in here
        and tuple(row.get(field) for field in KEY) not in replaced
    ]
    return write_table(path, FIELDS, [*kept, *rows])
