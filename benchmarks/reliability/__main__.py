"""Run one of the parts: ``python -m benchmarks.reliability fuzz [options]``."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

NAMES = sorted(
    path.stem for path in Path(__file__).parent.glob("*.py") if not path.stem.startswith("_")
)


def main(argv: list[str]) -> int:
    """Run the part that the first argument names; return its exit status."""
    name = argv[0] if argv else ""
    if name not in NAMES:
        print(f"the part is {name!r}, expected one of {', '.join(NAMES)}", file=sys.stderr)
        return 2
    status: int = importlib.import_module(f"benchmarks.reliability.{name}").main(argv[1:])
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
