"""The methods of the experiments: the class, what it takes, what it has of its own."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.optim import SGD, Optimizer

from benchmarks.paper.runs import Spec
from benchmarks.training_step import Takes
from wsam_fused import BSAM, ESAM, GSAM, RWSAM, SAM, WSAM
from wsam_fused.optimizer import SharpnessAwareOptimizer
from wsam_fused.schedules import ProportionalToLR

_MOMENTUM = 0.9


@dataclass(frozen=True)
class Method:
    """A method of the experiments.

    Attributes:
        make: Its class; None is momentum SGD itself.
        takes: What its ``step`` is given.
        fixed: Arguments that are the method.
    """

    make: type[SharpnessAwareOptimizer] | None
    takes: Takes = "closure"
    fixed: dict[str, Any] = field(default_factory=dict)

    @property
    def vanilla(self) -> bool:
        """Whether a step has one evaluation; such a method gets twice the epochs."""
        return self.make is None


METHODS = {
    "SGDM": Method(None),
    "SAM": Method(SAM),
    "ESAM": Method(ESAM, "losses"),
    "GSAM": Method(GSAM),
    "WSAM": Method(WSAM),
    "Coupled-WSAM": Method(WSAM, fixed={"decouple": False}),
    "BSAM": Method(BSAM),
    "RW-SAM": Method(RWSAM, "losses"),
    "m-SAM": Method(SAM, "closures"),
    "n-SAM": Method(SAM),
}


def build_optimizer(spec: Spec, net: nn.Module) -> Optimizer:
    """Return the optimizer of a run.

    BSAM's ``rho_min`` falls to 0 with the learning rate, as its authors have it. The ``m`` of
    m-SAM, samples of a micro-batch, is not the optimizer's.
    """
    method = METHODS[spec.method]
    base = {"lr": spec.lr, "momentum": _MOMENTUM, "weight_decay": spec.weight_decay}
    if method.make is None:
        return SGD(net.parameters(), **base)
    own = {**method.fixed, **dict(spec.hyper)}
    own.pop("m", None)
    if "rho_min" in own:
        own["rho_min"] = ProportionalToLR(own["rho_min"], 0.0, lr_high=spec.lr)
    if method.takes == "losses":
        own["seed"] = spec.seed
    return method.make(net.parameters(), SGD, backend=spec.backend, model=net, **base, **own)
