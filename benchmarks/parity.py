"""Write what the tests found of every method into docs/methods.md.

``make parity`` runs the tests and then ``python -m benchmarks.parity build/differences.json``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, environment
from benchmarks.readme import METHODS, filled
from benchmarks.report import table

BLOCK = "parity"

Entry = dict[str, Any]

# The order of the rows; what is not here comes last.
_ORDER = ("SAM", "WSAM", "Coupled-WSAM", "GSAM", "BSAM", "BSAM, as published", "ESAM", "RWSAM")
_GEOMETRIES = ("euclidean", "adaptive", "fisher")
_BACKENDS = {"cpu": "cpu", "cuda-emulated": "cuda (a)", "triton-interpreted": "triton (b)"}
_SPECIFICATION = "none (specification)"
_HEADER = (
    "method",
    "geometry",
    "code that it is compared with",
    "cases",
    "eager, f64",
    "fused, f64",
    "fused, f32",
    "step, f64",
    "step, f32",
    "fused backends",
)
_EXPLANATION = """\
Largest absolute differences that the tests found, of parameters of the size of 1. `cases`:
trajectories of 20 steps of somebody else's code; `eager` and `fused` say how far the reference and
the worst fused backend end from them. `step`: one step of the worst fused backend beside one of
`eager` (with micro-batches: of the formulas in plain torch), from the same state, over the bases,
options and layouts that its tests have; single precision rounds to 1.2e-07 of a value, and
gradients that cancel leave more.

(a) the CUDA kernels, run on the CPU by `tests/emulation`, (b) the Triton kernels in Triton's
interpreter: neither has run on a GPU yet."""


def render(entries: Sequence[Entry], machine: str) -> str:
    """Return the block of the document.

    Args:
        entries: What ``pytest --differences`` wrote.
        machine: Where and when that was.
    """
    keys = sorted({(e["method"], e["geometry"]) for e in entries}, key=_place)
    rows = [_row(key, [e for e in entries if (e["method"], e["geometry"]) == key]) for key in keys]
    return "\n\n".join([f"Found by `make parity` ({machine}).", table(_HEADER, rows), _EXPLANATION])


def _place(key: tuple[str, str]) -> tuple[bool, int, str, int]:
    method, geometry = key
    name = method.removesuffix(", micro-batches")
    rank = _ORDER.index(name) if name in _ORDER else len(_ORDER)
    return method != name, rank, method, _GEOMETRIES.index(geometry)


def _row(key: tuple[str, str], entries: Sequence[Entry]) -> tuple[str, ...]:
    trajectories = [e for e in entries if e["kind"] == "trajectory"]
    peers = dict.fromkeys(e["peer"] for e in trajectories)
    named = ["our specification" if peer == _SPECIFICATION else peer for peer in peers]
    # Every backend runs every case, float32 not all of them.
    counts = [
        max(e["cases"] for e in trajectories if (e["peer"], e["backend"]) == (peer, "eager"))
        for peer in peers
    ]
    eager, fused = (
        [e for e in trajectories if (e["backend"] == "eager") == is_eager]
        for is_eager in (True, False)
    )
    steps = [e for e in entries if e["kind"] == "step" and e["backend"] != "eager"]
    backends = {e["backend"] for e in [*fused, *steps]}
    return (
        *key,
        ", ".join(named) or "none",
        str(sum(counts) or "-"),
        _largest(eager, "float64"),
        _largest(fused, "float64"),
        _largest(fused, "float32"),
        _largest(steps, "float64"),
        _largest(steps, "float32"),
        ", ".join(shown for name, shown in _BACKENDS.items() if name in backends),
    )


def _largest(entries: Sequence[Entry], dtype: str) -> str:
    found = [entry["difference"] for entry in entries if entry["dtype"] == dtype]
    return f"{max(found):.0e}" if found else "-"


def main(arguments: Sequence[str] | None = None) -> None:
    """Rewrite the block."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.parity", description=__doc__.splitlines()[0]
    )
    parser.add_argument("file", type=Path, help="what pytest --differences wrote")
    path = parser.parse_args(arguments).file
    if not path.is_file():
        parser.error(f"argument file: {str(path)!r} is no file; run make parity")
    entries = json.loads(path.read_text())["rows"]
    here = environment("")
    machine = f"{here['device']}, torch {here['torch']}, sources {here['source']}, {here['date']}"
    text = filled(METHODS.read_text(), {BLOCK: render(entries, machine)})
    METHODS.write_text(text)
    print(f"wrote {METHODS.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
