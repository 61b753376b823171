"""The optimizers that faults are tried on, ours and those of a peer, over one small problem."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from wsam_fused import BSAM, GSAM, SAM, WSAM
from wsam_fused.method_keys import STEP

PEER = "pytorch-optimizer"
SHAPES = ((4, 3), (5,), (2, 2))

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16

_ADAMW = functools.partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1)
_SGDM = functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9)
_RMSPROP = functools.partial(torch.optim.RMSprop, lr=0.01)


class Subject(NamedTuple):
    """An optimizer to try.

    Attributes:
        make: Makes it from parameters, with ``backend=`` if it is one of ours.
        dtypes: Of the parameters of ``SHAPES``.
        evaluations: How often a step calls the closure, all in all.
        is_ours: Whether it is of this package.
        exact: Whether weights come back bit for bit; else to a rounding.
        checks_all: Whether a last gradient that is not finite skips the step.
        gradient_first: Whether the user makes the first evaluation before ``step(closure)``.
    """

    make: Callable[..., Any]
    dtypes: tuple[torch.dtype, ...] = (F32, F32, F32)
    evaluations: int = 2
    is_ours: bool = True
    exact: bool = True
    checks_all: bool = False
    gradient_first: bool = False


def _ours(method: Any, base: Any, *, restore: str = "backup", **options: Any) -> Callable[..., Any]:
    def make(params: list[Tensor], *, backend: str) -> Any:
        return method(params, base, rho=0.1, restore=restore, backend=backend, **options)

    return make


def _peer(method: str, base: Any, **options: Any) -> Callable[..., Any]:
    def make(params: list[nn.Parameter]) -> Any:
        import pytorch_optimizer

        base_class, base_options = base.func, base.keywords
        first = [nn.ParameterList(params)] if method == "WSAM" else []
        peer = getattr(pytorch_optimizer, method)
        return peer(*first, params, base_class, rho=0.1, **options, **base_options)

    return make


SUBJECTS: dict[str, Subject] = {
    "SAM, AdamW": Subject(_ours(SAM, _ADAMW)),
    "SAM, SGDM, recompute": Subject(_ours(SAM, _SGDM, restore="recompute"), exact=False),
    "WSAM, AdamW": Subject(_ours(WSAM, _ADAMW)),
    "WSAM coupled, SGDM": Subject(_ours(WSAM, _SGDM, gamma=0.8, decouple=False)),
    "WSAM, AdamW, check_finite": Subject(_ours(WSAM, _ADAMW, check_finite=True), checks_all=True),
    "GSAM, AdamW": Subject(_ours(GSAM, _ADAMW), checks_all=True),
    "BSAM, SGDM": Subject(_ours(BSAM, _SGDM), evaluations=3, checks_all=True),
    "SAM, RMSprop": Subject(_ours(SAM, _RMSPROP)),
    "WSAM, RMSprop": Subject(_ours(WSAM, _RMSPROP)),
    "WSAM, AdamW, two dtypes": Subject(_ours(WSAM, _ADAMW), dtypes=(F32, F64, F32)),
    "SAM, AdamW, master weights": Subject(
        _ours(SAM, _ADAMW, master_weights=True), dtypes=(BF16, F32, BF16)
    ),
}

PEERS: dict[str, Subject] = {
    f"{PEER} SAM, AdamW": Subject(_peer("SAM", _ADAMW), is_ours=False, gradient_first=True),
    f"{PEER} SAM, SGDM": Subject(_peer("SAM", _SGDM), is_ours=False, gradient_first=True),
    # Its WSAM subtracts the perturbation, so that the weights come back but for a rounding.
    f"{PEER} WSAM, AdamW": Subject(_peer("WSAM", _ADAMW), is_ours=False, exact=False),
    f"{PEER} WSAM coupled, SGDM": Subject(
        _peer("WSAM", _SGDM, gamma=0.8, decouple=False), is_ours=False, exact=False
    ),
}


def peer_version() -> str:
    """Return the version of the peer that is installed."""
    return version("pytorch-optimizer")


class Snapshot(NamedTuple):
    """Copies of all that a checkpoint would have.

    Attributes:
        weights: The parameters.
        states: What the base optimizer keeps of them.
        steps: The steps that the groups count; empty where they do not.
    """

    weights: list[Tensor]
    states: list[Tensor]
    steps: list[int]


# What the peer keeps in its state within a step.
_SCRATCH = ("old_p", "e_w", "grad", "sharpness")


class Run:
    """One optimizer in training.

    Args:
        subject: What to train with.
        backend: Of ours.

    Attributes:
        params: The parameters.
        optimizer: The optimizer.
        evaluated: How many evaluations of the step in progress have been begun.
        in_user_code: Whether a closure is running.
        disturb: Called in every evaluation with its number, from 0, and with whether its gradients
            are there.
        scaler: Scales the loss, if there is one.
    """

    def __init__(self, subject: Subject, backend: str) -> None:
        generator = torch.Generator().manual_seed(0)
        self.params = [
            nn.Parameter(torch.randn(shape, generator=generator, dtype=F64).to(dtype))
            for shape, dtype in zip(SHAPES, subject.dtypes, strict=True)
        ]
        self.subject = subject
        options = {"backend": backend} if subject.is_ours else {}
        self.optimizer = subject.make(self.params, **options)
        self.evaluated = 0
        self.in_user_code = False
        self.disturb: Callable[[int, bool], None] = lambda number, has_gradients: None
        self.loss_factor: Callable[[int], float] = lambda number: 1.0
        self.scaler: torch.amp.GradScaler | None = None

    def step(self, number: int) -> None:
        """Make one step on the data of ``number``."""
        self.evaluated = 0
        self.optimizer.zero_grad()
        closure = functools.partial(self._evaluate, number)
        if self.subject.gradient_first:
            closure()
        if self.scaler is None:
            self.optimizer.step(closure)
        else:
            self.optimizer.step(closure, scaler=self.scaler)
            self.scaler.update()

    def _evaluate(self, number: int) -> Tensor:
        evaluation = self.evaluated
        self.evaluated += 1
        with self._user_code():
            self.disturb(evaluation, False)
            self.optimizer.zero_grad()
            loss = self._loss(number) * self.loss_factor(evaluation)
            (loss if self.scaler is None else self.scaler.scale(loss)).backward()
            self.disturb(evaluation, True)
        return loss.detach()

    @contextmanager
    def _user_code(self) -> Iterator[None]:
        self.in_user_code = True
        try:
            yield
        finally:
            self.in_user_code = False

    def _loss(self, number: int) -> Tensor:
        generator = torch.Generator().manual_seed(number)
        loss = torch.zeros((), dtype=F64)
        for param in self.params:
            data = torch.randn(param.shape, generator=generator, dtype=F64)
            loss = loss + (param.to(F64) * data).sin().sum() + param.to(F64).square().mean()
        return loss

    def snapshot(self) -> Snapshot:
        """Copy weights and states as they are now."""
        states = [
            value.detach().clone() if isinstance(value, Tensor) else torch.tensor(value)
            for param in self.params
            for key, value in sorted(self.optimizer.state[param].items())
            if key not in _SCRATCH and value is not None
        ]
        base = getattr(self.optimizer, "base_optimizer", None)
        if base is not None and base.state is not self.optimizer.state:
            states += [
                value.detach().clone() if isinstance(value, Tensor) else torch.tensor(value)
                for param in self.params
                for key, value in sorted(base.state[param].items())
                if value is not None
            ]
        steps = [group[STEP] for group in self.optimizer.param_groups if STEP in group]
        return Snapshot([param.detach().clone() for param in self.params], states, steps)
