"""``python -m benchmarks.reliability NAME ...`` runs ``main`` of the module of that name."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec


def main(argv: list[str]) -> None:
    """Run the command that ``argv`` begins with."""
    name = argv[0] if argv else ""
    if not name.isidentifier() or find_spec(f"{__package__}.{name}") is None:
        sys.exit(f"the command is {name!r}, expected the name of a module of {__package__}")
    import_module(f"{__package__}.{name}").main(argv[1:])


if __name__ == "__main__":
    main(sys.argv[1:])
