"""How far the update of a step is, where its lists are updated one by one."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class UpdateProgress:
    """What the update of a step has done.

    Attributes:
        has_coefficients: Whether the group tables are those of the update.
        has_counted: Whether the step has been counted, in case it is skipped.
        checks_all: Form the norm of every gradient of this step, whatever the optimizer asks for.
        arrived: Parameters whose last gradient came to an update within the backward.
    """

    has_coefficients: bool = False
    has_counted: bool = False
    checks_all: bool = False
    arrived: set[Tensor] = field(default_factory=set)
