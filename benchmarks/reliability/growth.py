"""What grows over many steps: memory of the process, files, tensors, objects, containers."""

from __future__ import annotations

import gc
import itertools
import os
import statistics
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from wsam_fused import SAM, WSAM

SHAPES = ((8, 4), (8,), (1, 8), (1,))
# How many objects may come once, as what a library makes when it is first asked for something. Of
# those that come again and again there may be none.
AT_ONCE = 4
# How much resident memory may grow, by the median of what it does between two readings: what a leak
# of 8 bytes a step takes in 10^4 steps, and one of a byte in 12 steps in 10^6.
PAGES = 16
# And in all: Python takes memory for small objects by the MiB, when it happens to need it.
PAGES_AT_ONCE = 256
# Before that, caches fill.
WARM_SHARE = 0.2


class Reading(NamedTuple):
    """What is there after a number of steps.

    Attributes:
        steps: How many.
        resident: Pages of the process that are in memory.
        files: Open file descriptors.
        tensors: Tensors that Python knows of, of those made since shortly before the first reading.
        objects: Objects that the garbage collector knows of, likewise, without garbage.
        entries: Of all containers of the optimizer together, tables included.
    """

    steps: int
    resident: int
    files: int
    tensors: int
    objects: int
    entries: int


class Training:
    """An optimizer and a closure whose gradients are written by hand: w / 2, at every point.

    Args:
        make: Makes the optimizer of the parameters.
        before_step: What is done to the parameters before every step.
    """

    def __init__(
        self,
        make: Callable[[list[nn.Parameter]], Any],
        before_step: Callable[[list[nn.Parameter]], None] | None = None,
    ) -> None:
        torch.manual_seed(0)
        self.params = [nn.Parameter(torch.randn(shape)) for shape in SHAPES]
        self.optimizer = make(self.params)
        self._before_step = before_step

    def closure(self) -> float:
        """Set the gradients."""
        halves = torch._foreach_mul([param.detach() for param in self.params], 0.5)
        for param, grad in zip(self.params, halves, strict=True):
            param.grad = grad
        return 0.0

    def step(self) -> None:
        """Make one step."""
        if self._before_step is not None:
            self._before_step(self.params)
        self.optimizer.step(self.closure)


def rebind(params: list[nn.Parameter]) -> None:
    """Bring the parameters into other memory, so that the optimizer makes its tables anew."""
    for param in params:
        param.data = param.data.clone()


def _sam_over_sgdm(params: list[nn.Parameter]) -> SAM:
    return SAM(params, torch.optim.SGD, lr=1e-3, momentum=0.9, backend="cpu")


def _wsam_over_adamw(params: list[nn.Parameter]) -> WSAM:
    return WSAM(params, torch.optim.AdamW, lr=1e-3, backend="cpu")


# The training, and the share of the steps that it makes.
TRAININGS: Mapping[str, tuple[Callable[[], Training], float]] = {
    "SAM over SGDM": (lambda: Training(_sam_over_sgdm), 1.0),
    "WSAM over AdamW": (lambda: Training(_wsam_over_adamw), 1.0),
    "WSAM over AdamW, new memory at every step": (lambda: Training(_wsam_over_adamw, rebind), 0.1),
}


def readings(training: Training, steps: int, count: int = 10) -> list[Reading]:
    """Make ``steps`` steps and read ``count`` times, at equal distances."""
    found: list[Reading] = []
    training.step()  # imports what a step needs
    gc.collect()
    gc.freeze()  # hundreds of thousands of objects of torch, which are not looked at again
    try:
        for _ in range(3):  # takes memory for what it reads
            training.step()
            _read(training, 0, 0)
        for number in range(1, count + 1):
            for _ in range(steps // count):
                training.step()
            found.append(_read(training, number * (steps // count), len(found)))
    finally:
        gc.unfreeze()
    return found


def growth(found: list[Reading]) -> list[str]:
    """Say what has grown since a fifth of the steps; nothing if nothing has."""
    settled = [reading for reading in found if reading.steps >= WARM_SHARE * found[-1].steps]
    grown = []
    bounds = dict.fromkeys(("files", "tensors", "objects", "entries"), (0, AT_ONCE))
    for name, (steady, at_once) in {**bounds, "resident": (PAGES, PAGES_AT_ONCE)}.items():
        counts = [getattr(reading, name) for reading in settled]
        rises = [after - before for before, after in itertools.pairwise(counts)]
        if statistics.median(rises) * len(rises) > steady or sum(rises) > at_once:
            grown.append(
                f"{name}: {counts}, allowed are {steady} by the median rise and {at_once} in all"
            )
    return grown


def _read(training: Training, steps: int, earlier: int) -> Reading:
    """Read; ``earlier`` readings are objects of ours."""
    gc.collect()
    resident = resident_pages()
    objects = gc.get_objects()
    tensors = sum(issubclass(type(each), Tensor) for each in objects)
    return Reading(
        steps,
        resident,
        len(os.listdir("/proc/self/fd")),
        tensors,
        len(objects) - earlier,
        entries_of(training.optimizer),
    )


def resident_pages() -> int:
    """Pages of this process that are in memory (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1])


def entries_of(optimizer: Any) -> int:
    """Count the entries of all containers that an optimizer has, and the elements of its tensors.

    Those of the base optimizer and of every object of this package that can be reached are counted.
    """
    seen: set[int] = set()
    waiting: list[Any] = [optimizer]
    count = 0
    while waiting:
        found = waiting.pop()
        if id(found) in seen:
            continue
        seen.add(id(found))
        if isinstance(found, Tensor):
            count += found.numel()
            continue
        inner = list(_inside(found))
        if isinstance(found, (dict, list, tuple, set, frozenset)):
            count += len(found)
        waiting += inner
    return count


def _inside(found: Any) -> Iterator[Any]:
    if isinstance(found, Mapping):
        yield from found.keys()
        yield from found.values()
    elif isinstance(found, (list, tuple, set, frozenset)):
        yield from found
    elif type(found).__module__.startswith(("wsam_fused", "torch.optim")):
        yield from vars(found).values()
