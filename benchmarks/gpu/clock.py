"""Times on a device or, for a run without a GPU, on the host."""

from __future__ import annotations

import gc
import itertools
import time
from typing import Any

import torch

COPY_BYTES = 2 * 2**30
DRY_RUN_COPY_BYTES = 8 * 2**20


class Clock:
    """Stamps the stream of a CUDA device; on a CPU, the wall clock.

    Args:
        device: Whose time it is.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._on_gpu = device.type == "cuda"

    def stamp(self) -> Any:
        """Mark this place in the order of the device's work."""
        if not self._on_gpu:
            return time.perf_counter_ns()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def milliseconds(self, start: Any, end: Any) -> float:
        """Time from one stamp to another; both must have been reached."""
        return float(start.elapsed_time(end)) if self._on_gpu else (end - start) / 1e6

    def wait(self) -> None:
        """Wait until the device has nothing to do."""
        if self._on_gpu:
            torch.cuda.synchronize(self.device)

    def free_bytes(self) -> int | None:
        """Free memory of the device with torch's cache given back; None where it is not known."""
        if not self._on_gpu:
            return None
        gc.collect()  # what only refers to itself
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self.device)[0]


class CopyBuffer:
    """A copy from one place of the device's memory to another, larger than every cache.

    It is the yardstick of all bandwidths. Run before a step it also evicts the step's data from
    the caches and keeps the device busy while the host prepares the step, as a backward pass does.

    Args:
        clock: Of the device.
        size: Bytes of each place; by default 2 GiB or what a quarter of the free memory holds.
    """

    def __init__(self, clock: Clock, size: int | None = None) -> None:
        if size is None:
            size = self.size_for(clock.free_bytes())
        self._clock = clock
        # Random, because a memory may be faster with constant data.
        self._source = torch.rand(size // 4, device=clock.device)
        self._target = torch.empty_like(self._source)

    @staticmethod
    def size_for(free: int | None) -> int:
        """Bytes of each place where ``free`` bytes are free; None if that is not known."""
        return DRY_RUN_COPY_BYTES if free is None else min(COPY_BYTES, free // 4)

    @property
    def moved(self) -> int:
        """Bytes read and written by one copy."""
        return 2 * self._source.nbytes

    def run(self) -> None:
        """Copy once."""
        self._target.copy_(self._source)

    def rates(self, count: int) -> list[float]:
        """Copy ``count`` times and return the GB/s of each."""
        self.run()
        stamps = [self._clock.stamp()]
        for _ in range(count):
            self.run()
            stamps.append(self._clock.stamp())
        self._clock.wait()
        return [self.rate(self._clock.milliseconds(*pair)) for pair in itertools.pairwise(stamps)]

    def rate(self, milliseconds: float) -> float:
        """GB/s of a copy."""
        return self.moved / milliseconds / 1e6
