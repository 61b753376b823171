"""In which dtypes weights and states are kept, and how they are rounded."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from wsam_fused.arguments import choice
from wsam_fused.base_rules import BaseRule

# Parameters of these are not recomputed: it would round to the few bits they have.
LOW_PRECISION = (torch.bfloat16, torch.float16)

MASTER_KEY = "master_weight"
STATE_DTYPES = ("float32", "parameter")


class Precision(NamedTuple):
    """How parameters of 16 bits are kept; it means nothing for wider ones.

    Attributes:
        has_master: Whether their weights are in the state, in float32, and the parameters are a
            copy of them.
        narrow_states: Whether their states have 16 bits as well.
        by_chance: Whether what is stored in bfloat16 is rounded up or down with the probability
            that the value asks for, and not to nearest.
    """

    has_master: bool = False
    narrow_states: bool = False
    by_chance: bool = False

    @classmethod
    def of(cls, master_weights: bool, state_dtype: str, stochastic_rounding: bool) -> Precision:
        """Validate the arguments of an optimizer.

        Raises:
            ValueError: ``state_dtype`` is none of ``STATE_DTYPES``, or nothing is left to round.
        """
        narrow = choice("state_dtype", state_dtype, STATE_DTYPES) == "parameter"
        if master_weights and stochastic_rounding:
            raise ValueError(
                "stochastic_rounding is True with master_weights, expected one of them: float32 "
                "weights lose nothing that chance could keep"
            )
        return cls(bool(master_weights), narrow, bool(stochastic_rounding))

    def check(self, param: Tensor, *, has_fused_update: bool) -> None:
        """Refuse what cannot be done for a parameter.

        Raises:
            ValueError: It is float16 and to be rounded by chance, or its base optimizer is stepped
                as it is, which rounds and keeps states itself.
        """
        if self.by_chance and param.dtype == torch.float16:
            raise ValueError(
                "stochastic_rounding is True with a float16 parameter, expected bfloat16 or wider "
                "ones; use master_weights=True"
            )
        if any(self) and not has_fused_update:
            raise ValueError(
                "master_weights, state_dtype or stochastic_rounding is set with a base_optimizer "
                "that is stepped as it is, expected torch.optim.SGD, Adam or AdamW"
            )

    def keeps_master(self, dtype: torch.dtype) -> bool:
        """Whether parameters of ``dtype`` have float32 weights in the state."""
        return self.has_master and dtype in LOW_PRECISION

    def state_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Dtype of the states of parameters of ``dtype``."""
        return torch.float32 if dtype in LOW_PRECISION and not self.narrow_states else dtype

    def rounding_seed(self, dtype: torch.dtype, rule: BaseRule) -> int:
        """Return where chance begins, -1 for rounding to nearest.

        The same everywhere, so that replicas of a parameter round alike.
        """
        return 0 if self.by_chance and dtype == torch.bfloat16 and rule != BaseRule.NONE else -1


@torch.no_grad()
def follow_parameter(master: Tensor, param: Tensor) -> None:
    """Take over what somebody has written to a parameter, and leave the rest as exact as it is."""
    unchanged = master.to(param.dtype) == param
    master.copy_(torch.where(unchanged, master, param.to(master.dtype)))
