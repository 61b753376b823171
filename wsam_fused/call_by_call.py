"""What steps need that are made call by call."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import ClassVar

from torch import Tensor

from wsam_fused.method_optimizer import MethodOptimizer


class StepsCallByCall(MethodOptimizer):
    """A part of :class:`~wsam_fused.optimizer.SharpnessAwareOptimizer`."""

    # What methods without the two-call form say.
    instead_of_calls: ClassVar[str | None] = None

    def same_randomness(self) -> AbstractContextManager[None]:
        """Let the evaluations of a step call by call draw the same random numbers.

        Around the first evaluation it remembers the state of torch's default generators, of the CPU
        and of the parameters' CUDA devices. Around a later one it draws from that state, and puts
        the generators back afterwards, also after an exception: they go on as if only the first
        evaluation had drawn. All backward calls of an evaluation belong into one block.

        Raises:
            RuntimeError: On entry: the first evaluation was not made within it, or this one was
                already; or a CUDA graph is being captured.

        Example:
            >>> model = torch.nn.Sequential(torch.nn.Linear(3, 1), torch.nn.Dropout())
            >>> opt = SAM(model.parameters(), torch.optim.SGD, lr=0.1)
            >>> for call in (opt.first_step, opt.second_step):
            ...     with opt.same_randomness():
            ...         model(torch.ones(8, 3)).square().mean().backward()
            ...     call(zero_grad=True)
        """
        self._require_calls("same_randomness()")
        return self._replay.evaluation(self._read_so_far(), self._params())

    def _undo_step(self) -> None:
        """Do what ``restore()`` does, in any thread: autograd has threads of its own."""
        self._replay.forget()
        if self._engine is not None:
            try:
                self._batch_norm.restore()
            finally:
                self._engine.abandon()

    def _params(self) -> list[Tensor]:
        return [param for group in self.param_groups for param in group["params"]]

    def _read_so_far(self) -> int:
        return 0 if self._engine is None else self._engine.read

    def _require_calls(self, what: str) -> None:
        if self.instead_of_calls is not None:
            raise RuntimeError(f"{type(self).__name__} has no {what}; {self.instead_of_calls}")
