"""Brings small tables from the host to a device without waiting for it."""

from __future__ import annotations

import torch
from torch import Tensor

# Uploads of one tensor that a capture can make without allocating.
_SPARES = 4


class Upload:
    """The way of one small tensor to its device.

    A copy from pinned memory is only queued, so the host must not write to that memory again before
    the device has read it. Each upload therefore takes pinned memory of its own, which torch's
    allocator hands out again when it has been read. What a CUDA graph captured is read at every
    replay: that memory is kept, unchanged, as long as the target lives. It was allocated before the
    capture, in which an allocation might be refused.

    Args:
        target: Where the values go; unless that is a CUDA device, a plain copy is made.
    """

    def __init__(self, target: Tensor) -> None:
        self._target = target
        self._queued = target.device.type == "cuda"
        self._spares: list[Tensor] = []
        self._captured: list[Tensor] = []

    def send(self, values: Tensor) -> None:
        """Write ``values``, a tensor on the host with the target's shape and dtype."""
        if not self._queued:
            self._target.copy_(values)
            return
        if _is_capturing():
            staged = self._spares.pop() if self._spares else self._pinned()
            self._captured.append(staged)
        else:
            staged = self._pinned()
            while len(self._spares) < _SPARES:
                self._spares.append(self._pinned())
        staged.copy_(values)
        self._target.copy_(staged, non_blocking=True)

    def is_captured(self) -> bool:
        """Whether a CUDA graph makes uploads of this target at its replays."""
        return bool(self._captured)

    def is_replayed(self) -> bool:
        """Whether the target may change, or is about to, by the replays of a CUDA graph."""
        return self._queued and (self.is_captured() or _is_capturing())

    def _pinned(self) -> Tensor:
        shape, dtype = self._target.shape, self._target.dtype
        return torch.empty(shape, dtype=dtype, device="cpu", pin_memory=True)


def _is_capturing() -> bool:
    return torch.cuda.is_current_stream_capturing()
