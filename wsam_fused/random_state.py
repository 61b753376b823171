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


class Replay:
    """The evaluations of one step, of which the later ones draw what the first one drew.

    Only torch's default generators take part, those of the CPU and of the parameters' CUDA devices;
    random numbers of Python, NumPy or other generators do not.
    """

    def __init__(self) -> None:
        self._state: RandomState | None = None
        self._evaluation = -1  # the last one that was made within evaluation()

    @contextmanager
    def evaluation(self, number: int, params: Iterable[Tensor]) -> Iterator[None]:
        """Surround all of one evaluation.

        If it raises, the first evaluation leaves the generators where they are by then, a later one
        leaves them where the first had.

        Args:
            number: Of the evaluation, 0 for the one at w, which draws as usual.
            params: Whose devices' generators are meant, besides that of the CPU.

        Raises:
            RuntimeError: The first evaluation is missing, one comes twice, or a CUDA graph is being
                captured.
        """
        in_use = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        if in_use and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "random numbers are replayed by setting the state of the generators on the host, "
                "which a CUDA graph cannot capture; capture steps without replay_rng"
            )
        self._require_next(number)
        if number > 0:
            assert self._state is not None  # the evaluation before has been made
            with self._state.replayed():
                yield
        else:
            self._state = RandomState(params)
            try:
                yield
            except BaseException:
                self.forget()
                raise
        self._evaluation = number

    def _require_next(self, number: int) -> None:
        if self._state is None and number > 0:
            raise RuntimeError(
                "same_randomness() was entered after first_step(), but the first evaluation was "
                "not made within it; there is nothing to replay"
            )
        # Another block would draw from the beginning again.
        if self._state is not None and number <= self._evaluation:
            raise RuntimeError(
                f"same_randomness() was entered twice for evaluation {number + 1} of a step; put "
                "all of its backward calls into one block, or call restore() to begin a new step"
            )

    def has(self, number: int) -> bool:
        """Whether an evaluation has been made within :meth:`evaluation`."""
        return self._evaluation >= number

    def forget(self) -> None:
        """Begin a new step."""
        self._state = None
        self._evaluation = -1
