"""Checks that the contenders of the GPU report compute the same before anything is timed."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from benchmarks.contenders import BASES, GPU_CONTENDERS, Base, Contender, Ours, OursEager
from benchmarks.gpu.notes import DIFFERENT, reason_of
from benchmarks.harness import PARITY_SHAPES, ParityError, Problem, check_parity

# Neighbours in bfloat16 are at most that far apart, relative to the smaller one.
_BFLOAT16_SPACING = 2.0**-7


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
    reasons = {}
    for name in names:
        cls = GPU_CONTENDERS[name]
        try:
            for base in BASES.values():
                check_parity(cls, OursEager, base, device)
                if issubclass(cls, Ours):
                    _check_bfloat16(cls, base, device)
        except ParityError as error:
            reasons[name] = f"{DIFFERENT}{str(error).splitlines()[0][:160]}"
        except Exception as error:
            reasons[name] = reason_of(error)
    return reasons


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
