"""Native entry points with damaged arguments: an exception, no crash, and nothing is written.

The calls are made in processes of their own (native_fuzz.py); a seed that is named in a failure can
be made again by ``native_fuzz.TARGETS[target](seed)``.
"""

from __future__ import annotations

import random

import pytest
import torch
from emulated import build
from native_calls import random_call
from native_damages import OF_ARGUMENTS, OF_TABLES, missing_address, wrong_chunk, wrong_place
from native_fuzz import fuzz

from wsam_fused import _extension

pytestmark = pytest.mark.skipif(
    _extension.UNAVAILABLE is not None, reason=str(_extension.UNAVAILABLE)
)
CASES = {"cpu": 1500, "cuda-emulated": 500, "reader": 1000}


@pytest.mark.parametrize("target", CASES)
def test_damaged_calls_raise_and_write_nothing(target: str) -> None:
    if target == "cuda-emulated" and build() is not None:
        pytest.skip(str(build()))
    if target == "reader" and _extension.READ_GRADIENTS is None:
        pytest.skip("the reader is not built")
    found = fuzz(target, 0, CASES[target], seconds=120)
    assert not found.crashes, "\n".join(found.crashes)
    assert not found.corruptions, "\n".join(found.corruptions)
    assert found.cases == CASES[target]
    assert min(found.accepted, found.refused) > found.cases / 20, "only one kind of call was made"


def test_a_crash_is_found_with_its_seed_and_the_calls_go_on() -> None:
    found = fuzz("on-purpose", 0, 8, seconds=120)
    assert (found.cases, found.accepted) == (8, 6)
    assert [crash.splitlines()[0] for crash in found.crashes] == ["on-purpose, seed 3: SIGSEGV"]
    assert found.corruptions == ["on-purpose, seed 5: wrong on purpose"]


@pytest.mark.parametrize("kind", OF_ARGUMENTS + OF_TABLES, ids=lambda kind: kind.__name__)
def test_every_damage_is_found_by_an_exception(kind: object) -> None:
    """Each alone: another one would hide that it is not noticed."""
    made = 0
    unread = (wrong_chunk, wrong_place, missing_address)
    for seed in range(60):
        rng = random.Random(seed)
        call = random_call(rng, lambda dtype: (dtype,))
        if not kind(call, rng):  # type: ignore[operator]
            continue
        made += 1
        operation = getattr(torch.ops.wsam_fused, call.operation).default
        with pytest.raises((RuntimeError, TypeError, NotImplementedError)) as raised:
            operation(*call.arguments.values())
        if kind in unread:
            assert "table has" in str(raised.value) or "chunks has" in str(raised.value)
    assert made > 5, "the damage was hardly made"
