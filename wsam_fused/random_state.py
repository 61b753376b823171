"""Lets two evaluations draw the same random numbers, such as dropout masks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class RandomState:
    """The state of torch's default generators as it is now.

    Args:
        params: Whose devices' generators are meant, besides that of the CPU.
    """

    def __init__(self, params: Iterable[Tensor]) -> None:
        devices = dict.fromkeys(param.device for param in params)
        self._cuda = [d for d in devices if d.type == "cuda"]
        self._states = [torch.cuda.get_rng_state(device) for device in self._cuda]
        self._cpu_state = torch.get_rng_state()

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Draw from this state; afterwards go on as if nothing had been drawn."""
        with torch.random.fork_rng([device.index for device in self._cuda]):
            torch.set_rng_state(self._cpu_state)
            for device, state in zip(self._cuda, self._states, strict=True):
                torch.cuda.set_rng_state(state, device)
            yield
