"""Notices that a step with a closure has thrown away gradients accumulated before it.

Leftovers of the last step are no sign of that, and neither are those that a closure clears itself.
Gradients that no step has left, and a closure that does not clear them, are: that is how
micro-batches are accumulated for an optimizer that evaluates once.
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from wsam_fused.callers import stacklevel_of_caller

_LOST = (
    "step(closure) cleared gradients that no step had left in .grad, and the closure would have "
    "added to them. A backward before step(closure) is wasted: the closure computes all that a "
    "step needs. If it was that of earlier micro-batches, they are lost; docs/use_with.md says how "
    "to accumulate"
)


# Attribute of a gradient that a step has left. A weak reference would be an obstacle for
# torch.utils.swap_tensors(), by which a module may exchange its parameters.
_LEFT_BY = "_wsam_fused_left_by"


class _First(NamedTuple):
    """A parameter with a gradient, which stands for all: what accumulates does so everywhere."""

    param: Tensor
    grad: Tensor


class LeftoverGradients:
    """Knows which gradients the last step left; warns once of others that are lost."""

    def __init__(self) -> None:
        self._marker: _First | None = None
        self._done = False

    def note(self, optimizer: Optimizer) -> None:
        """Remember what is there at the end of a step."""
        first = _first(optimizer)
        if first is not None:
            setattr(first.grad, _LEFT_BY, id(self))  # whatever is in it
        self._marker = None

    def clear(self, optimizer: Optimizer) -> None:
        """Clear the gradients, but for a zero where a closure that accumulates will add to it."""
        first = _first(optimizer)
        optimizer.zero_grad()
        if first is None or self._done:
            return
        if getattr(first.grad, _LEFT_BY, None) != id(self):
            marker = torch.zeros_like(first.grad)
            first.param.grad = marker
            self._marker = _First(first.param, marker)

    def forgive(self) -> None:
        """Note that the closure clears gradients itself."""
        marker, self._marker = self._marker, None
        if marker is not None and marker.param.grad is marker.grad:
            marker.param.grad = None

    def check(self) -> None:
        """Warn if the closure that has been evaluated added to the zero."""
        marker, self._marker = self._marker, None
        if marker is None or marker.param.grad is not marker.grad:
            return
        if marker.grad._version == 0:  # the closure has nothing to do with this parameter
            marker.param.grad = None
            return
        self._done = True
        warnings.warn(_LOST, UserWarning, stacklevel=stacklevel_of_caller())


def _first(optimizer: Optimizer) -> _First | None:
    for group in optimizer.param_groups:
        for param in group["params"]:
            if param.grad is not None:
                return _First(param, param.grad)
    return None
