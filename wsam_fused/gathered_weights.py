"""What FSDP2 has gathered of the weights, which is outdated as soon as they move.

A module keeps its gathered weights after a forward without backward, after a backward with
``set_reshard_after_backward(False)`` and after a closure that raised. It would use them in the next
forward as they are.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from wsam_fused.distributed import is_dtensor


class GatheredWeights:
    """The FSDP2 modules whose parameters an optimizer steps.

    They are found by their parameters, which a module shows while nothing is gathered: when an
    optimizer is built from them.
    """

    def __init__(self) -> None:
        self._modules: list[Any] = []

    def find(self, params: Iterable[Tensor]) -> None:
        """Look for modules that gather any of ``params``."""
        wanted = {id(param) for param in params if is_dtensor(param)}
        if not wanted:
            return
        known = {id(module) for module in self._modules}
        for module in _fsdp_modules():
            if id(module) not in known and any(id(p) in wanted for p in module.parameters()):
                self._modules.append(module)

    def forget(self) -> None:
        """Let the next forward gather the weights again."""
        for module in self._modules:
            module.reshard()

    def forget_failed(self) -> None:
        """The same after a forward or backward that may have been left half-way."""
        for module in self._modules:
            reset = getattr(module, "reset_iter_state", None)  # newer than the oldest torch
            if reset is None:
                continue
            try:
                reset()
            except RuntimeError:
                continue  # it is inside another one, which resets it too
        self.forget()


def _fsdp_modules() -> list[Any]:
    """Return all FSDP2 modules of this process, outermost first where they are nested."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    states = sys.modules.get("torch.distributed._composable_state")
    kind = getattr(fsdp, "FSDPModule", None)
    # torch has no public way from a parameter to the module that gathers it.
    known = getattr(states, "_module_state_mapping", None)
    if kind is None or known is None:
        return []
    return [module for module in list(known) if isinstance(module, kind)]
