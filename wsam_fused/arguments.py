"""Checks of user arguments; every message names the argument, its value and what is allowed."""

from __future__ import annotations

import math
from typing import Any

import torch


def number(
    name: str,
    value: Any,
    low: float,
    high: float = math.inf,
    *,
    low_included: bool = True,
    high_included: bool = True,
) -> float:
    """Return ``value`` as a float if it is finite and lies in the range.

    Args:
        name: How the user calls the argument.
        value: A number or a one-element tensor.
        low: Smallest allowed value.
        high: Largest allowed value; infinity means any finite one.
        low_included: Whether ``low`` itself is allowed.
        high_included: Whether ``high`` itself is allowed.

    Raises:
        TypeError: ``value`` is not a number.
        ValueError: ``value`` is not finite or lies outside the range.
    """
    if high == math.inf:
        allowed = f"{'>=' if low_included else '>'} {low:g} and finite"
    else:
        opening, closing = "[" if low_included else "(", "]" if high_included else ")"
        allowed = f"in {opening}{low:g}, {high:g}{closing}"
    if isinstance(value, torch.Tensor) and value.numel() != 1:
        raise ValueError(f"{name} is a tensor of {value.numel()} elements, expected one element")
    try:
        if _is_no_number(value):
            raise TypeError
        result = float(value)
    except OverflowError:  # a whole number beyond all floats
        result = math.inf
    except (TypeError, ValueError):
        raise TypeError(f"{name} is {value!r}, expected a number {allowed}") from None
    inside = low <= result <= high
    inside = inside and (low_included or result > low) and (high_included or result < high)
    if not math.isfinite(result) or not inside:
        raise ValueError(f"{name} is {result!r}, expected a number {allowed}")
    return result


def _is_no_number(value: Any) -> bool:
    """Whether ``float`` reads a number from text, or fails with an error of its own."""
    if isinstance(value, torch.Tensor):
        return value.is_complex() or value.is_meta
    return isinstance(value, str | bytes | bytearray)


def flag(name: str, value: Any) -> bool:
    """Return ``value`` if it is True or False, or 1 or 0; TypeError otherwise."""
    if not (isinstance(value, int) and value in (0, 1)):
        raise TypeError(f"{name} is {value!r}, expected True or False")
    return bool(value)


def host_number(name: str, value: Any) -> float:
    """Return ``value`` as a float, unless that would wait for a device.

    Raises:
        TypeError: ``value`` is a tensor on another device than the CPU.
    """
    if isinstance(value, torch.Tensor) and value.device.type != "cpu":
        raise TypeError(
            f"{name} is a tensor on {value.device}, expected a number or a tensor on the CPU: "
            "every step would wait for the device to read it (only lr may be on one)"
        )
    return float(value)


def whole_number(name: str, value: Any, low: int) -> int:
    """Return ``value`` if it is a whole number of at least ``low``.

    Raises:
        TypeError: ``value`` is not a whole number.
        ValueError: ``value`` is too small.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is {value!r}, expected a whole number >= {low}")
    if value < low:
        raise ValueError(f"{name} is {value}, expected a whole number >= {low}")
    return value


def choice(name: str, value: Any, allowed: tuple[str, ...]) -> str:
    """Return ``value`` if it is one of ``allowed``; ValueError otherwise."""
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(map(repr, allowed))}")
    return str(value)
