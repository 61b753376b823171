"""Gradients that are multiplied by a loss scale: every backend takes it out again, bit for bit.

By a power of two nothing is rounded on the way in, and so nothing may be lost on the way out: in
norms, coefficients, the radius, the metrics, clipping.
"""

from __future__ import annotations

from typing import Any

import interpreted
import pytest
import torch
from cases import BASES, METHODS, OPTIONS, call, seed_of, set_gradients
from interpreted_steps import NAME, few
from torch import Tensor

from wsam_fused.backends import BACKENDS
from wsam_fused.plan import INVERSE_SCALES, Slot

TRITON = interpreted.interpreted_backend()
NAMES = [name for name, backend in BACKENDS.items() if backend.unavailable() is None]
if TRITON.unavailable() is None:
    NAMES.append(NAME)
ON = pytest.mark.parametrize("name", NAMES)
SCALE = 2.0**12
EVERY = (True, True, True)

# Of parameters, and how they are kept.
PRECISIONS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "float32": (torch.float32, {}),
    "float64": (torch.float64, {}),
    "bfloat16-master": (torch.bfloat16, {"master_weights": True}),
    "float16-narrow": (torch.float16, {"state_dtype": "parameter"}),
}


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, NAME, TRITON)


def device_of(name: str) -> torch.device:
    return torch.device((BACKENDS[name].DEVICE_TYPES or ("cpu",))[0])


class Stepped:
    """Steps in which the gradients of some evaluations are multiplied by the loss scale."""

    def __init__(
        self, name: str, method: str, base: str, scaled: tuple[bool, ...], **options: Any
    ) -> None:
        dtype = options.pop("dtype", torch.float32)
        torch.manual_seed(0)
        values = [value.to(device_of(name)) for value in few(dtype)]
        self.params = [torch.nn.Parameter(value) for value in values]
        self.optimizer: Any = METHODS[method](self.params, BASES[base], backend=name, **options)
        self.scaled = scaled
        begin = self.optimizer._begin

        def begin_scaled(**arguments: Any) -> Any:
            engine = begin(**arguments)
            for shared in engine.lists.shared.values():
                shared.scalars[INVERSE_SCALES] = 1.0 / SCALE if any(scaled) else 1.0
            return engine

        self.optimizer._begin = begin_scaled

    def evaluate(self, number: int, evaluation: int) -> None:
        """Give it the gradients of one evaluation."""
        set_gradients(self.params, seed_of(number, evaluation))
        for param in self.params:
            assert param.grad is not None
            # Small enough that float16 holds their multiples.
            param.grad.mul_(2.0**-4 * (SCALE if self.scaled[evaluation] else 1.0))
        if evaluation and not self.scaled[evaluation]:
            self.optimizer._engine.scalars[Slot.INV_SCALE1 + evaluation] = 1.0
        call(self.optimizer, evaluation)

    def step(self, number: int) -> list[Tensor]:
        """Make one step; return the parameters at every point, and the states at the end."""
        seen = []
        for evaluation in range(self.optimizer.evaluations):
            self.evaluate(number, evaluation)
            seen += [param.detach().clone() for param in self.params]
        return seen + self.states()

    def states(self) -> list[Tensor]:
        states = [self.optimizer.state[param].values() for param in self.params]
        return [value.clone() for values in states for value in values]


def compare(name: str, method: str, base: str, scaled: tuple[bool, ...], **options: Any) -> None:
    ours = Stepped(name, method, base, scaled, **options)
    plain = Stepped(name, method, base, (False, False, False), **options)
    before = ours.params[1].detach().clone()
    for number in range(2):
        for tensor, expected in zip(ours.step(number), plain.step(number), strict=True):
            assert torch.equal(tensor, expected)
    assert not torch.equal(ours.params[1], before), "the comparison would pass by doing nothing"
    assert int(ours.optimizer.skipped_steps) == 0


@ON
@pytest.mark.parametrize("option", ["plain", "asam", "fisher", "clip"])
@pytest.mark.parametrize("method", ["sam", "wsam", "gsam", "bsam"])
def test_a_scaled_step_is_the_unscaled_one(method: str, option: str, name: str) -> None:
    base = "nesterov" if method == "sam" else "adamw"
    compare(name, method, base, EVERY, **OPTIONS[option])


@ON
@pytest.mark.parametrize("precision", PRECISIONS)
def test_in_every_precision(precision: str, name: str) -> None:
    dtype, options = PRECISIONS[precision]
    compare(name, "gsam", "adamw", EVERY, dtype=dtype, **OPTIONS["clip-adaptive"], **options)


@ON
@pytest.mark.parametrize("scaled", [(True, False, False), (True, True, False)])
def test_every_evaluation_has_a_scale_of_its_own(scaled: tuple[bool, ...], name: str) -> None:
    compare(name, "bsam", "adamw", scaled, **OPTIONS["clip"])


@ON
def test_what_somebody_else_has_found_skips_the_step(name: str) -> None:
    stepped = Stepped(name, "wsam", "adamw", EVERY, **OPTIONS["backup"])
    stepped.step(0)
    before = [param.detach().clone() for param in stepped.params] + stepped.states()
    stepped.evaluate(1, 0)
    stepped.optimizer._engine.scalars[Slot.FOUND_INF] = 1.0
    stepped.evaluate(1, 1)
    after = [param.detach() for param in stepped.params] + stepped.states()
    assert all(torch.equal(tensor, w) for tensor, w in zip(after, before, strict=True))
    assert int(stepped.optimizer.skipped_steps) == 1
