"""Run a part: ``python -m benchmarks.reliability NAME [options]``; without a name, list them."""

from __future__ import annotations

import sys
from importlib import import_module

PARTS = {
    "faults": "the fault matrix, beside what pytorch-optimizer does",
    "fuzz": "random steps, random sequences of calls, damaged arguments of the native operations",
    "long": "a million steps: what grows, and where recomputed weights drift",
    "mutants": "mutation testing of rows, base rules and the reference",
}


def main(argv: list[str]) -> int:
    """Run the part that the first argument names; return its exit status."""
    if not argv:
        print("\n".join(f"{name:8} {text}" for name, text in PARTS.items()))
        return 0
    if argv[0] not in PARTS:
        print(f"NAME is {argv[0]!r}, expected one of {', '.join(PARTS)}", file=sys.stderr)
        return 2
    status: int | None = import_module(f"benchmarks.reliability.{argv[0]}").main(argv[1:])
    return status or 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
