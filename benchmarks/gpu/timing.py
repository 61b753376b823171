"""Times contenders side by side on one device."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.contenders import Contender, Ours
from benchmarks.gpu.clock import Clock, CopyBuffer
from benchmarks.gpu.notes import reason_of
from benchmarks.harness import Problem


class Sample(NamedTuple):
    """One contender in one round, in milliseconds.

    Attributes:
        device: From the start of its first to the end of its last kernel, both halves, while the
            device still had other work when the host began.
        host: What the calls took on the host, with nothing queued before.
        wall: From the call to the end of the last kernel, both halves, with nothing queued before.
        copy: One copy of the copy buffer, just before.
    """

    device: float
    host: float
    wall: float
    copy: float


@dataclass
class Timings:
    """What a case measured.

    Attributes:
        samples: Per contender, in the order of the rounds.
        failures: Why others have none.
        state_dtypes: In which dtype each kept the base optimizer's state.
        copy_bytes: Bytes read and written by one copy.
    """

    samples: dict[str, list[Sample]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    state_dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    copy_bytes: int = 0


def time_contenders(
    problem: Problem,
    contenders: Sequence[Contender],
    clock: Clock,
    copy: CopyBuffer,
    *,
    rounds: int,
    warmup: int,
) -> Timings:
    """Time everyone in every round, each time in another order.

    Whoever raises is left out from there on; the others go on.

    Args:
        problem: What they step.
        contenders: Who takes part.
        clock: Of the device.
        copy: The yardstick.
        rounds: How many count.
        warmup: Steps that each makes before.
    """
    found = Timings(copy_bytes=copy.moved)
    share_states(problem.params, contenders)
    for one in contenders:
        _try(found, one, partial(_warm_up, found, problem, one, clock, copy, warmup))
    shuffler = random.Random(0)
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for one in shuffler.sample(list(contenders), len(contenders)):
                _try(found, one, partial(_sample, found, problem, one, clock, copy))
    finally:
        gc.enable()
    return found


def _try(found: Timings, one: Contender, action: Callable[[], None]) -> None:
    if one.name in found.failures:
        return
    try:
        action()
    except Exception as error:
        found.failures[one.name] = reason_of(error)
        found.samples.pop(one.name, None)


def _warm_up(
    found: Timings,
    problem: Problem,
    one: Contender,
    clock: Clock,
    copy: CopyBuffer,
    steps: int,
) -> None:
    for _ in range(max(steps, 1)):
        device_time(problem, one, clock, copy)
    found.state_dtypes[one.name] = state_dtype(one, problem.params[0])
    found.samples[one.name] = []


def _sample(
    found: Timings, problem: Problem, one: Contender, clock: Clock, copy: CopyBuffer
) -> None:
    device, copied = device_time(problem, one, clock, copy)
    host, wall = host_time(problem, one, clock)
    found.samples[one.name].append(Sample(device, host, wall, copied))


def device_time(
    problem: Problem, one: Contender, clock: Clock, copy: CopyBuffer
) -> tuple[float, float]:
    """Make one step behind other work of the device.

    Returns:
        Milliseconds of the step, and of one copy before it.
    """
    problem.set_first()
    copy.run()
    before = clock.stamp()
    copy.run()
    spans = [(clock.stamp(), _half(one.first, clock))]
    if one.gradients > 1:
        problem.set_second()
        copy.run()
        copy.run()
        spans.append((clock.stamp(), _half(one.second, clock)))
    clock.wait()
    step = sum(clock.milliseconds(start, end) for start, end in spans)
    return step, clock.milliseconds(before, spans[0][0])


def _half(half: Callable[[], None], clock: Clock) -> Any:
    half()
    return clock.stamp()


def host_time(problem: Problem, one: Contender, clock: Clock) -> tuple[float, float]:
    """Make one step with nothing queued before.

    Returns:
        Milliseconds until the calls returned, and until the device was done.
    """
    host = wall = 0
    for number, half in enumerate((one.first, one.second)[: one.gradients]):
        (problem.set_first, problem.set_second)[number]()
        clock.wait()
        start = time.perf_counter_ns()
        half()
        returned = time.perf_counter_ns()
        clock.wait()
        host += returned - start
        wall += time.perf_counter_ns() - start
    return host / 1e6, wall / 1e6


def share_states(params: Sequence[Tensor], contenders: Sequence[Contender]) -> None:
    """Give the contenders one state for all, each with a step count of its own.

    Values do not matter here, and memory does. ``step`` cannot be shared: the fused optimizers
    keep it on the device, where the others would wait for every one of them.
    Ours takes part with float32 only: with low precision its states have another dtype.
    """
    pool: dict[tuple[Tensor, str], Tensor] = {}

    def shared(param: Tensor, key: str) -> Tensor:
        if (param, key) not in pool:
            pool[param, key] = torch.zeros_like(param)
        return pool[param, key]

    for one in contenders:
        if isinstance(one, Ours) and params[0].dtype != torch.float32:
            continue
        is_sgd = one.base.optimizer is torch.optim.SGD
        keys = ("momentum_buffer",) if is_sgd else ("exp_avg", "exp_avg_sq")
        fused = one.optimizer is not None and one.optimizer.defaults.get("fused")
        for param in params:
            entry = {key: shared(param, key) for key in keys}
            if not is_sgd:
                entry["step"] = torch.zeros((), device=param.device if fused else "cpu")
            one.base_state[param].update(entry)


def state_dtype(one: Contender, param: Tensor) -> torch.dtype:
    """Return the dtype in which a contender keeps the state of ``param``."""
    for value in one.base_state[param].values():
        if isinstance(value, Tensor) and value.dim() > 0:
            return value.dtype
    return param.dtype
