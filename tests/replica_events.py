"""What ranks tell each other in a step, and what they do about a gradient that is not finite."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from replica_runs import Case, closures_of, flat, optimizer_of, part_of, problem
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from wsam_fused import averages

# Two buckets for the gradients of the model: its first weight has one of its own.
SMALL_BUCKETS = 256


def events_of_a_step(
    rank: int, method: str, parts: int, bucket_bytes: int
) -> list[tuple[str, int]]:
    """Return the closures and collectives of a step in the order in which they begin."""
    found: list[tuple[str, int]] = []
    net, x, y = problem()
    model = DistributedDataParallel(net)
    all_reduce = dist.all_reduce

    def hook(state, bucket):  # type: ignore[no-untyped-def]  # torch wants the classes or nothing
        found.append(("model", bucket.buffer().numel()))
        scaled = bucket.buffer().div_(dist.get_world_size())
        future: Any = all_reduce(scaled, async_op=True).get_future()
        return future.then(lambda done: done.value()[0])

    def spy(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        found.append(("optimizer", tensor.numel()))
        return all_reduce(tensor, *args, **kwargs)

    def noted(closure: Callable[[], Tensor]) -> Tensor:
        found.append(("closure", 0))
        return closure()

    model.register_comm_hook(None, hook)
    case = Case(method, "sgdm")
    optimizer = optimizer_of(model.parameters(), case, model=model, perturb_scope="local")
    x, y = part_of(rank, parts, x), part_of(rank, parts, y)
    closures = [functools.partial(noted, c) for c in closures_of(optimizer, model, x, y, parts)]
    with (
        mock.patch.object(dist, "all_reduce", spy),
        mock.patch.object(averages, "BUCKET_BYTES", bucket_bytes),
    ):
        optimizer.step(closures if parts > 1 else closures[0])
    return found


def layouts(rank: int) -> list[Tensor]:
    """Tensors of several dtypes and layouts, with values of this rank."""
    generator = torch.Generator().manual_seed(rank)

    def values(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return [
        values(3),
        values(4, 6).t(),
        values(0),
        values(),
        values(5, 8)[:, ::2],
        values(7).float(),
        values(40, 3),  # fills a bucket
        values(2, 3, 4, 4).to(memory_format=torch.channels_last),
        values(40, 5).t(),  # likewise
        values(9).bfloat16(),
        values(40, 6)[:, ::2],  # likewise, but is no block of memory
    ]


def averaged(rank: int) -> list[list[Tensor]]:
    """Averages of these lists, twice with one object, as in two steps."""
    kept = averages.Averages()
    assert dist.group.WORLD is not None
    found = []
    with mock.patch.object(averages, "BUCKET_BYTES", SMALL_BUCKETS):
        for offset in (0, 2):
            means = kept.start(layouts(rank + offset), dist.group.WORLD)
            kept.wait()
            found.append([mean.clone() for mean in means])
    return found


def refusal_of_a_static_graph(rank: int) -> str:
    net, _, _ = problem()
    model = DistributedDataParallel(net, static_graph=True)
    try:
        optimizer_of(model.parameters(), Case("sam", "sgdm"), model=model, perturb_scope="local")
    except ValueError as error:
        return str(error)
    return "none"


def poisoned_step(
    rank: int, method: str, parts: int, evaluation: int = 0
) -> tuple[list[Tensor], float]:
    """Train with a gradient on rank 0 that is not finite at w in the second of three steps.

    Returns:
        The weights after every step, and how many were skipped.
    """
    net, x, y = problem()
    model = DistributedDataParallel(net)
    case = Case(method, "adamw")
    optimizer = optimizer_of(model.parameters(), case, model=model, perturb_scope="local")
    calls = step = 0

    def loss_of(x: Tensor, y: Tensor) -> Tensor:
        nonlocal calls
        if parts == 1:
            optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        if rank == 0 and step == 1 and calls == 0:
            loss = loss * float("nan")
        calls += 1
        loss.backward()
        return loss

    x, y = part_of(rank, parts, x), part_of(rank, parts, y)
    pieces = zip(x.chunk(parts), y.chunk(parts), strict=True)
    closures = [functools.partial(loss_of, *piece) for piece in pieces]
    found = [flat(net.parameters())]
    for step in range(3):  # noqa: B007  (the closure reads it)
        calls = 0
        optimizer.step(closures if parts > 1 else closures[0])
        found.append(flat(net.parameters()))
    return found, float(optimizer.skipped_steps)


def telemetry(rank: int, method: str) -> dict[str, float | None]:
    """What is told of a step, and the norms of this rank's gradient and of the mean one."""
    net, x, y = problem()
    model = DistributedDataParallel(net)
    mine = part_of(rank, 1, x), part_of(rank, 1, y)
    found: dict[str, float | None] = {}
    for name, (inputs, targets) in {"own": mine, "mean": (x, y)}.items():
        loss = nn.functional.mse_loss(net(inputs), targets)
        grads = torch.autograd.grad(loss, list(net.parameters()))
        found[name] = float(flat(grads).norm())
    case = Case(method, "sgdm")
    optimizer = optimizer_of(model.parameters(), case, model=model, perturb_scope="local")
    optimizer.step(closures_of(optimizer, model, *mine, 1)[0])
    told = optimizer.last.grad_norm
    found["told"] = None if told is None else float(told)
    return found
