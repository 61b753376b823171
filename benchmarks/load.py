"""How much of the machine other processes use meanwhile, and rounds in which they use little."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from benchmarks.common import QUIET_SHARE

_STAT = Path("/proc/stat")
# Linux counts in ticks; what others used is known to about one per core.
_RESOLUTION_TICKS = 1
# So many times the rounds asked for are tried to get as many quiet ones.
_PATIENCE = 3

T = TypeVar("T")


def quiet_rounds(
    make: Callable[[], T],
    rounds: int,
    warmup: int,
    advance: Callable[[], object] = lambda: None,
) -> list[tuple[float, T]]:
    """Make rounds until enough of them were quiet, or for ``_PATIENCE`` times as many.

    Args:
        make: Makes one and returns what it measured. No garbage is collected meanwhile.
        rounds: How many count.
        warmup: How many are made before and do not count.
        advance: Called after each quiet round.

    Returns:
        The quietest, each after the share of the cores that other processes used.
    """
    seen: list[tuple[float, T]] = []
    quiet = 0
    gc.collect()
    gc.disable()
    try:
        for number in range(-warmup, _PATIENCE * rounds):
            load = OtherLoad()
            found = make()
            share = load.share()
            if number < 0:
                continue
            seen.append((share, found))
            if share <= QUIET_SHARE:
                quiet += 1
                advance()
            if quiet == rounds:
                break
    finally:
        gc.enable()
    return sorted(seen, key=lambda one: one[0])[:rounds]


class OtherLoad:
    """Measures the share of all cores that other processes use, from one reading to the next.

    It matters more than it seems: where every tensor ends in a barrier of all threads, one busy
    core makes each barrier wait for the scheduler, so that a loop over tensors slows down by
    orders of magnitude and one launch for all of them hardly.
    """

    def __init__(self) -> None:
        self._known = _STAT.exists()
        self._last = self._read()

    def share(self) -> float:
        """Return the share since the last reading, 0 to 1; 0 where it cannot be known."""
        if not self._known:
            return 0.0
        last, self._last = self._last, self._read()
        busy, own, wall = (now - before for now, before in zip(self._last, last, strict=True))
        cores = os.cpu_count() or 1
        resolution = _RESOLUTION_TICKS / os.sysconf("SC_CLK_TCK")
        return max(0.0, busy - own - cores * resolution) / (cores * wall)

    def _read(self) -> tuple[float, float, float]:
        if not self._known:
            return 0.0, 0.0, 0.0
        # user, nice, system, idle, iowait, irq, softirq, steal
        ticks = [int(word) for word in _STAT.read_text().split("\n", 1)[0].split()[1:9]]
        busy = sum(ticks) - ticks[3] - ticks[4]
        return busy / os.sysconf("SC_CLK_TCK"), time.process_time(), time.monotonic()
