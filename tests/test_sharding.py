"""Sharded parameters (DTensor): every rank's part is stepped as one process steps the whole.

All ranks compute in float64. What they differ in from one process is the order of sums: of
gradients over ranks, of norms over parts.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
from processes import result, results_of, run_on_ranks
from sharded_cases import ALL_BASES, METHODS, WAYS, problem, summary, train
from tolerances import TRAJECTORY, close

# Number of ranks -> (way, method, base, micro-batches).
CASES: dict[int, list[tuple[str, str, str, int]]] = {
    2: [
        *[("fsdp", method, "sgdm", 1) for method in METHODS],
        ("fsdp", "wsam", "adamw", 1),
        ("fsdp", "wsam", "rmsprop", 1),
        ("fsdp", "bsam", "rmsprop-maximize", 1),
        ("fsdp", "sam", "sgdm", 2),
        ("fsdp", "wsam", "adamw", 2),
        ("fsdp", "wsam-every", "adamw", 2),
        ("fsdp", "gsam", "adamw", 2),
        ("fsdp-keeps-gathered", "wsam", "adamw", 1),
        ("fsdp-keeps-gathered", "bsam", "sgdm", 1),
        ("fsdp-offloaded", "wsam", "adamw", 1),
        ("tp", "wsam", "adamw", 1),
        ("tp", "gsam", "sgdm", 1),
    ],
    4: [
        *[("fsdp", method, "adamw", 1) for method in METHODS],
        ("fsdp", "wsam", "amsgrad", 1),
        ("fsdp", "wsam", "nesterov", 1),
        ("fsdp", "gsam", "rmsprop", 1),
        ("fsdp", "gsam", "sgdm", 2),
        ("hsdp", "wsam", "adamw", 1),
        ("hsdp", "gsam", "sgdm", 1),
        *[("tp-and-fsdp", method, "sgdm", 1) for method in METHODS],
        ("tp-and-fsdp", "wsam", "adamw", 1),
        ("tp-and-fsdp", "wsam", "rmsprop", 1),
        ("tp-and-fsdp", "wsam", "adamw", 2),
    ],
}
ALL = [(world, *case) for world, cases in CASES.items() for case in cases]


def run(way: str, method: str, base: str, parts: int) -> dict[str, Any]:
    model, x, y = problem()
    WAYS[way].shard(model)
    optimizer = METHODS[method](model.parameters(), ALL_BASES[base])
    train(model, optimizer, WAYS[way].share(x, parts), WAYS[way].share(y, parts), parts=parts)
    return summary(model, optimizer)


@functools.cache
def expected(method: str, base: str, parts: int) -> dict[str, Any]:
    model, x, y = problem()
    optimizer = METHODS[method](model.parameters(), ALL_BASES[base])
    train(model, optimizer, x, y, parts=parts)
    return summary(model, optimizer)


def worker(world: int) -> dict[str, Any]:
    return results_of({str(case): functools.partial(run, *case) for case in CASES[world]})


@pytest.fixture(scope="module")
def runs() -> dict[int, Any]:
    return {world: run_on_ranks(worker, world, world) for world in CASES}


@pytest.mark.parametrize("case", ALL, ids=lambda case: "-".join(map(str, case)))
def test_parts_equal_the_whole(case: tuple[int, str, str, str, int], runs: dict[int, Any]) -> None:
    world, *rest = case
    found = result(runs[world], str(tuple(rest)))
    whole = expected(*rest[1:])
    for rank, values in enumerate(found):
        assert values.keys() == whole.keys()
        for name, value in values.items():
            close(value, whole[name], TRAJECTORY, f"{name} on rank {rank}")
