"""``ZeroRedundancyOptimizer``: inside a method it works, a method inside it does not."""

from __future__ import annotations

import sys
from types import FrameType

from torch.optim import Optimizer

_MODULE = "torch.distributed.optim.zero_redundancy_optimizer"


def is_zero_redundancy(candidate: object) -> bool:
    """Whether an object is a ``ZeroRedundancyOptimizer``; false where nobody imported it."""
    kind = getattr(sys.modules.get(_MODULE), "ZeroRedundancyOptimizer", None)
    return kind is not None and isinstance(candidate, kind)


def check_not_inside(method: str) -> None:
    """Validate that a method is not being built by a ``ZeroRedundancyOptimizer``.

    Raises:
        TypeError: It is. It would perturb by the norm over one rank's share of the parameters.
    """
    if sys.modules.get(_MODULE) is None:
        return
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if is_zero_redundancy(frame.f_locals.get("self")):
            raise TypeError(
                f"optimizer_class is {method}, which ZeroRedundancyOptimizer would give one rank's "
                "share of the parameters: the perturbation needs the norm over all of them. Build "
                f"it the other way round: {method}(params, ZeroRedundancyOptimizer(params, "
                "torch.optim.AdamW, lr=...)); or shard with torch.distributed.fsdp.fully_shard"
            )
        frame = frame.f_back


def check_steps(base: Optimizer) -> None:
    """Validate that a base optimizer makes its step when it is told to.

    Raises:
        ValueError: It is a ``ZeroRedundancyOptimizer`` that steps within the backward.
    """
    if is_zero_redundancy(base) and getattr(base, "_overlap_with_ddp", False):
        raise ValueError(
            "overlap_with_ddp is True, expected False: the base optimizer would step within every "
            "backward, also that at the perturbed weights"
        )
