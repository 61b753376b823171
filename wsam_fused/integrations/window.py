"""The micro-batches of one optimizer step, to be evaluated once more at other weights."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch


class Window:
    """Remembers what was accumulated since the last step.

    Args:
        evaluate: Computes the loss of a micro-batch and calls ``backward``; its arguments are those
            of :meth:`add`.
        without_sync: Returns the context in which replicas do not exchange gradients, which is how
            all micro-batches but the last are evaluated.
    """

    def __init__(
        self,
        evaluate: Callable[..., Any],
        without_sync: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self._evaluate = evaluate
        self._without_sync = without_sync
        self._batches: list[tuple[Any, ...]] = []
        self._complete = False

    def add(self, *batch: Any, is_last: bool) -> None:
        """Add a micro-batch; the one after the last begins a new window."""
        if self._complete:
            self.clear()
        self._batches.append(batch)
        self._complete = is_last

    def clear(self) -> None:
        """Forget all."""
        self._batches = []
        self._complete = False

    def evaluate(self) -> list[Any]:
        """Evaluate all of them in their order and return what ``evaluate`` returned."""
        results = []
        with torch.enable_grad():
            for batch in self._batches[:-1]:
                with self._without_sync():
                    results.append(self._evaluate(*batch))
            results.append(self._evaluate(*self._batches[-1]))
        return results
