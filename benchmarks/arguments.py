"""Command-line arguments that check themselves."""

from __future__ import annotations

import argparse
from collections.abc import Callable


def whole_number(low: int, high: int) -> Callable[[str], int]:
    """Return a parser of whole numbers from ``low`` to ``high``, for ``type=`` of argparse."""

    def parse(text: str) -> int:
        expected = f"expected a whole number in [{low}, {high}]"
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no number, {expected}") from None
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{value} is out of range, {expected}")
        return value

    return parse
