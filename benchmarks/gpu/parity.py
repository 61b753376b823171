"""Checks that the contenders of the GPU report compute the same before anything is timed.

    python -m benchmarks.gpu.parity NAME

Checks one contender on the GPU and prints one line of JSON. Ours are checked in a process of their
own: a kernel that fails leaves its device unusable to all that the process does afterwards.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from benchmarks.contenders import BASES, GPU_CONTENDERS, Base, Contender, Ours, OursEager
from benchmarks.gpu.notes import DIFFERENT, reason_of
from benchmarks.gpu.process import json_of
from benchmarks.harness import PARITY_SHAPES, ParityError, Problem, check_parity

# Neighbours in bfloat16 are at most that far apart, relative to the smaller one.
_BFLOAT16_SPACING = 2.0**-7
_LIMIT_S = 120.0


def disagreeing(names: Iterable[str], device: torch.device) -> dict[str, str]:
    """Compare contenders with the reference backend on small parameters.

    In float32 all are compared. In bfloat16 only ours are: they promise to round once, where the
    others round in every operation.

    Args:
        names: Who is compared.
        device: Where.

    Returns:
        Why a contender is not measured, for those that compute something else or fail.
    """
    found: dict[str, str] = {}
    for name in names:
        if device.type == "cuda" and issubclass(GPU_CONTENDERS[name], Ours):
            reason = json_of(["benchmarks.gpu.parity", name], _LIMIT_S)["note"]
        else:
            reason = _reason(name, device)
        if reason:
            found[name] = reason
    return found


def _reason(name: str, device: torch.device) -> str:
    """Why a contender is not measured; empty if it computes the same."""
    cls = GPU_CONTENDERS[name]
    try:
        for base in BASES.values():
            check_parity(cls, OursEager, base, device)
            if issubclass(cls, Ours):
                _check_bfloat16(cls, base, device)
    except ParityError as error:
        return f"{DIFFERENT}{str(error).splitlines()[0][:160]}"
    except Exception as error:
        return reason_of(error)
    return ""


def _check_bfloat16(cls: type[Contender], base: Base, device: torch.device) -> None:
    actual, expected = (_one_step(one, base, device) for one in (cls, OursEager))
    for where, pairs in zip(("at the ascent point", "after the update"), (0, 1), strict=True):
        try:
            torch.testing.assert_close(
                actual[pairs], expected[pairs], rtol=_BFLOAT16_SPACING, atol=1e-6
            )
        except AssertionError as error:
            raise ParityError(
                f"{cls.name} with {base.name} in bfloat16 differs from the reference {where}: "
                f"{error}"
            ) from error


def _one_step(
    cls: type[Contender], base: Base, device: torch.device
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the parameters at the ascent point and after the update."""
    problem = Problem(PARITY_SHAPES, device=device, dtype=torch.bfloat16)
    one = cls(problem.params, base)
    problem.set_first()
    one.first()
    ascent = [param.detach().clone() for param in problem.params]
    problem.set_second()
    one.second()
    return ascent, [param.detach().clone() for param in problem.params]


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=list(GPU_CONTENDERS))
    name = parser.parse_args().name
    found: dict[str, Any] = {"note": _reason(name, torch.device("cuda"))}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
