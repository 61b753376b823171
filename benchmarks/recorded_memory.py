"""The exact peak of torch's memory while something runs."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch


def peak_of(run: Callable[[], Any], device: torch.device | str = "cpu") -> int:
    """Run something and return how many bytes torch had at the worst moment.

    On a CPU every allocation and release is recorded, and what was there before does not count. On
    a GPU torch's allocator keeps count itself, of what was there before, too.

    Args:
        run: What is run. Memory that it leaves behind counts while it runs.
        device: Whose memory counts.
    """
    gc.collect()  # what others left is not freed meanwhile
    gc.disable()  # the recording makes many objects, each collection looks at all of them
    try:
        if torch.device(device).type == "cpu":
            with _no_messages(), torch.autograd.profiler.profile(profile_memory=True) as recording:
                run()
            return _peak(recording)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device)
    finally:
        gc.enable()


@contextlib.contextmanager
def _no_messages() -> Iterator[None]:
    """The profiler's library writes a line at every start and stop, past Python."""
    sys.stderr.flush()
    saved = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
            yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


def _peak(recording: Any) -> int:
    events = [e for e in recording.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    alive = peak = 0
    for event in events:
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak
