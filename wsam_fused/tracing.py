"""Keeps the steps of an optimizer out of what ``torch.compile`` traces, and in one thread."""

from __future__ import annotations

import torch
from torch.optim import Optimizer

from wsam_fused.one_thread import in_one_thread

_STEPS = ("step", "first_step", "second_step", "third_step", "restore")


def keep_untraced(optimizer: type[Optimizer]) -> None:
    """Let ``torch.compile`` break its graph at the steps of a class and run them as they are.

    They read addresses of gradients, which a graph cannot hold. A compiled model in a closure stays
    compiled. They also refuse a second thread, see :func:`in_one_thread`.

    Called when an optimizer is made, not when a class is defined: this imports Dynamo, which takes
    longer than all of this package. Making any optimizer imports it as well, and lets torch wrap
    `step` for its profiler and hooks; that wrapper has to stay inside this one.

    Args:
        optimizer: The class; after the first time nothing changes.
    """
    for name in _STEPS:
        function = getattr(optimizer, name)
        if not getattr(function, "_torchdynamo_disable", False):
            untraced = torch.compiler.disable(in_one_thread(function))  # type: ignore[no-untyped-call]
            setattr(optimizer, name, untraced)
