"""A rank that fails while it is perturbed, and what the others do."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from replica_runs import Case, closures_of, flat, optimizer_of, part_of, problem
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

# Method and scope.
CASES = [("wsam", "global"), ("wsam", "local"), ("gsam", "local")]
FAILING = 0
GROUP_TIMEOUT = 3.0


class Outcome(NamedTuple):
    """What a failed step left behind."""

    error: str
    seconds: float
    weights_are_back: bool
    state_is_untouched: bool
    is_perturbed: bool


def _numbers(optimizer: Any) -> list[Tensor]:
    return [value.clone() for state in optimizer.state.values() for value in state.values()]


def failing_step(rank: int, method: str, scope: str, group: Any, *, leave: bool) -> Outcome:
    """Make a good step, and one in which a rank fails in its second evaluation.

    ``leave``: the failing rank ends its process.
    """
    net, x, y = problem()
    model = DistributedDataParallel(net, process_group=group)
    optimizer = optimizer_of(
        model.parameters(),
        Case(method, "adamw"),
        model=model,
        perturb_scope=scope,
        restore="backup",  # exact, so that weights can be compared bit by bit
    )
    closure = closures_of(optimizer, model, part_of(rank, 1, x), part_of(rank, 1, y), 1)[0]
    calls = 0
    moved = False

    def failing() -> Tensor:
        nonlocal calls, moved
        calls += 1
        if calls == 2:
            moved = not torch.equal(flat(net.parameters()), weights)
            if rank == FAILING:
                if leave:
                    os._exit(0)
                raise ArithmeticError("the second evaluation has failed")
        return closure()

    optimizer.step(closure)
    weights, state = flat(net.parameters()), _numbers(optimizer)
    start = time.monotonic()
    try:
        optimizer.step(failing)
        error = "nothing"
    except (RuntimeError, ArithmeticError) as raised:
        error = type(raised).__name__
    seconds = time.monotonic() - start
    assert moved, "it was not perturbed when it failed"
    pairs = zip(state, _numbers(optimizer), strict=True)
    return Outcome(
        error,
        seconds,
        torch.equal(flat(net.parameters()), weights),
        all(torch.equal(before, after) for before, after in pairs),
        optimizer.is_perturbed,
    )


def raising(rank: int) -> list[Outcome]:
    """Every case in a process group of its own, which it ruins."""
    net, x, _ = problem()
    model = DistributedDataParallel(net)
    model(x).sum().backward()  # what is imported now does not count as waiting later
    found = []
    for method, scope in CASES:
        group = dist.new_group(timeout=timedelta(seconds=GROUP_TIMEOUT))
        found.append(failing_step(rank, method, scope, group, leave=False))
        dist.barrier()
    return found


def dying(rank: int) -> Outcome:
    return failing_step(rank, "wsam", "local", dist.group.WORLD, leave=True)
