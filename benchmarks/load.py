"""How much of the machine other processes use meanwhile."""

from __future__ import annotations

import os
import time
from pathlib import Path

_STAT = Path("/proc/stat")
# Linux counts in ticks; what others used is known to about one per core.
_RESOLUTION_TICKS = 1


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
