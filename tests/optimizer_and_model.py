"""An optimizer beside its model (model_of_steps.py): how both are made and compared.

The model computes in float64; between steps it takes over the optimizer's values, so that
differences do not pile up.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from conftest import ON_CPU
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant
from model_of_steps import ModelOfSteps, Setup, Snapshot
from tolerances import ONE_STEP, close
from torch.optim import SGD, AdamW

from wsam_fused import BSAM, SAM, WSAM
from wsam_fused.schedules import InverseSqrt

METHODS: dict[str, Callable[..., Any]] = {
    "sam": SAM,
    "wsam": WSAM,
    "coupled": functools.partial(WSAM, decouple=False),
    "bsam": BSAM,
}
BASE_KEYS = {"sgd": ("momentum", "dampening"), "adamw": ()}
SHAPES = [(3,), (2, 3), (), (65,), (1,), (4, 2), (0,)]
# The emulated kernels run thread by thread, and take as long for one case as others for ten.
backends = st.sampled_from([name for name in ON_CPU if name != "cuda-emulated"])
setups = st.builds(
    lambda base, momentum, clip, finite, eta, restore, every, rho, **rest: Setup(
        base=base,
        options={
            "every": every,
            "restore": restore,
            **({} if clip is None else {"max_grad_norm": clip}),
            **({"check_finite": True} if finite else {}),
            **({} if rest["geometry"] == "euclidean" else {"eta": eta}),
        },
        hyper={
            "lr": 0.05,
            "rho": rho,
            "rho_min": 0.1,
            "gamma": 0.75,
            "weight_decay": 0.1,
            **({"momentum": momentum[0], "dampening": momentum[1]} if base == "sgd" else {}),
        },
        **rest,
    ),
    method=st.sampled_from(list(METHODS)),
    base=st.sampled_from(list(BASE_KEYS)),
    momentum=st.sampled_from([(0.0, 0.0), (0.9, 0.0), (0.9, 0.5)]),
    geometry=st.sampled_from(["euclidean", "adaptive", "fisher"]),
    clip=st.sampled_from([None, None, 0.5]),
    finite=st.booleans(),
    eta=st.sampled_from([0.05, 1.0]),
    restore=st.sampled_from(["recompute", "backup"]),
    every=st.sampled_from([1, 1, 2]),
    rho=st.sampled_from([0.0, 0.05, 0.4]),
    decaying=st.booleans(),
)


class OptimizerAndModel(RuleBasedStateMachine):
    """Both, without anything that is done to them."""

    counts: ClassVar[Counter[str]] = Counter()

    @initialize(
        setup=setups, backend=backends, dtype=st.sampled_from([torch.float64, torch.float32])
    )
    def make(self, setup: Setup, backend: str, dtype: torch.dtype) -> None:
        self.setup, self.backend, self.dtype = setup, backend, dtype
        self.model = ModelOfSteps(setup)
        self.handle: Any = None
        self.saved: list[tuple[Any, Snapshot]] = []
        self.spare = 0
        tensors = [self._tensor() for _ in range(3)]
        self.model.add_group(tensors[:2])
        self.model.add_group(tensors[2:])
        self.optimizer = self._new_optimizer([tensors[:2], tensors[2:]])
        self.counts["cases"] += 1

    def _tensor(self) -> torch.Tensor:
        shape = SHAPES[self.spare % len(SHAPES)]
        generator = torch.Generator().manual_seed(self.spare)
        self.spare += 1
        values = torch.randn(shape, generator=generator, dtype=torch.float64).to(self.dtype)
        return values.t().contiguous().t() if values.dim() == 2 else values

    def _new_optimizer(self, groups: list[list[torch.Tensor]]) -> Any:
        params = [
            {"params": [t if t.requires_grad else torch.nn.Parameter(t) for t in tensors]}
            for tensors in groups
        ]
        hyper = self.setup.hyper
        own = {"rho": InverseSqrt(hyper["rho"]) if self.setup.decaying else hyper["rho"]}
        if self.setup.method == "bsam":
            own["rho_min"] = hyper["rho_min"]
        elif self.setup.method != "sam":
            own["gamma"] = hyper["gamma"]
        base: Any = functools.partial(AdamW, betas=(0.9, 0.99), eps=1e-8)
        if self.setup.base == "sgd":
            base = functools.partial(SGD, **{key: hyper[key] for key in BASE_KEYS["sgd"]})
        base = functools.partial(base, lr=hyper["lr"], weight_decay=hyper["weight_decay"])
        options = {**self.setup.options, "geometry": self.setup.geometry, "backend": self.backend}
        return METHODS[self.setup.method](params, base, **own, **options)

    # ---- gradients ---------------------------------------------------------------------------

    @property
    def params(self) -> list[torch.nn.Parameter]:
        return [param for group in self.optimizer.param_groups for param in group["params"]]

    @property
    def is_pending(self) -> bool:
        return self.model.read > 0

    def _loss(self, seed: int, mask: int) -> torch.Tensor:
        """A loss whose gradient is c + s w, for the parameters in ``mask``."""
        generator = torch.Generator().manual_seed(seed)
        total = torch.zeros((), dtype=self.dtype)
        for i, param in enumerate(self.params):
            c = torch.randn(param.shape, generator=generator, dtype=torch.float64).to(self.dtype)
            if mask >> i % 4 & 1:
                total = total + (c * param).sum() + 0.25 * (param * param).sum()
        return total

    def _model_backward(self, seed: int, mask: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for i, param in enumerate(self.model.params):
            c = torch.randn(param.point.shape, generator=generator, dtype=torch.float64)
            if mask >> i % 4 & 1:
                grad = c.to(self.dtype).double() + 0.5 * param.point
                param.grad = grad if param.grad is None else param.grad + grad

    def _take_gradients(self) -> None:
        """Let the model have the gradients as the optimizer sees them."""
        for param, known in zip(self.params, self.model.params, strict=True):
            known.grad = None if param.grad is None else param.grad.double()

    # ---- the comparison ----------------------------------------------------------------------

    @invariant()
    def agrees(self) -> None:
        self.counts["calls"] += 1
        assert self.optimizer.is_perturbed == self.is_pending
        assert {group["sam_step"] for group in self.optimizer.param_groups} == {self.model.steps}
        tolerance = ONE_STEP[self.dtype]
        for i, (param, known) in enumerate(zip(self.params, self.model.params, strict=True)):
            close(param.detach().double(), known.point, tolerance, f"parameter {i}")
            assert (param.grad is None) == (known.grad is None), f"gradient {i}"
            if param.grad is not None:
                self._same_gradient(param.grad.double(), known.grad, i)
            self._same_state(self.optimizer.state.get(param, {}), known, i)
        for group, hyper in zip(self.optimizer.param_groups, self.model.hyper, strict=True):
            keys = hyper.keys() & group.keys() - ({"rho"} if self.setup.decaying else set())
            assert all(group[key] == hyper[key] for key in keys)
        if not self.is_pending:
            self._align()

    def _same_gradient(self, grad: torch.Tensor, known: Any, i: int) -> None:
        tolerance = ONE_STEP[self.dtype]
        assert torch.allclose(grad, known, tolerance.rtol, tolerance.atol, equal_nan=True), i

    def _same_state(self, state: Any, known: Any, i: int) -> None:
        assert state or not known.states, f"state {i} is missing"
        for key, value in state.items():
            if key == "step":
                assert float(value) == known.updates, f"count {i}"
            elif value is not None:
                expected = known.states.get(key, torch.zeros_like(known.weights))
                close(value.double(), expected, ONE_STEP[self.dtype], f"{key} {i}")

    def _align(self) -> None:
        """Take over what the optimizer has, once it is known to be right."""
        for param, known in zip(self.params, self.model.params, strict=True):
            known.weights = known.point = param.detach().double().clone()
            known.grad = None if param.grad is None else param.grad.double().clone()
            for key in known.states:
                known.states[key] = self.optimizer.state[param][key].double().clone()
