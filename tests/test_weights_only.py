"""Every checkpoint can be loaded with ``torch.load(weights_only=True)``, which runs no code of it.

What comes back is what was saved, bit for bit, and a twin that loads it saves the same again.
"""

from __future__ import annotations

import functools
import io
from typing import Any

import numpy as np
import per_sample_cases
import pytest
import torch
from cases import BASES, FOREIGN_BASES, KEEPING, METHODS, OPTIONS, keepings_of, parameters, step
from per_sample_cases import Linear
from test_checkpoint_form import bits
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from wsam_fused import GSAM, SAM, WSAM
from wsam_fused.schedules import InverseSqrt, ProportionalToLR

ALL_BASES = {**BASES, **FOREIGN_BASES}
ALL_METHODS = {**METHODS, **per_sample_cases.METHODS}


def loaded(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    found: dict[str, Any] = torch.load(file, weights_only=True)
    return found


def advance(optimizer: Any, params: list[nn.Parameter], number: int) -> None:
    """One step, by given gradients or by losses of samples."""
    if isinstance(optimizer, per_sample_cases.ESAM | per_sample_cases.RWSAM):
        optimizer.step(Linear(params, seed=number))
    else:
        step(optimizer, params, number)


def check(build: Any, dtype: torch.dtype = torch.float64, named: bool = False) -> dict[str, Any]:
    """Train, save and load into a twin; return the checkpoint as it was loaded."""
    params = parameters("unaligned", dtype)
    optimizer = build([(f"weight{i}", p) for i, p in enumerate(params)] if named else params)
    for number in range(2):
        advance(optimizer, params, number)
    saved = optimizer.state_dict()
    found = loaded(saved)
    assert bits(as_numbers(found)) == bits(as_numbers(saved))
    twins = [nn.Parameter(param.detach().clone()) for param in params]
    twin = build([(f"weight{i}", p) for i, p in enumerate(twins)] if named else twins)
    twin.load_state_dict(found)
    assert bits(as_numbers(twin.state_dict())) == bits(as_numbers(saved))
    return found


def as_numbers(saved: dict[str, Any]) -> dict[str, Any]:
    """The checkpoint with float64 in place of bfloat16, which numpy does not have."""
    states = {
        index: {
            key: value.double() if isinstance(value, torch.Tensor) else value
            for key, value in entry.items()
        }
        for index, entry in saved["state"].items()
    }
    return {**saved, "state": states}


@pytest.mark.parametrize("base", ALL_BASES)
@pytest.mark.parametrize("method", ALL_METHODS)
def test_every_method_over_every_base(method: str, base: str) -> None:
    if method == "esam" and "maximize" in base:
        pytest.skip("ESAM refuses maximize")
    found = check(lambda params: ALL_METHODS[method](params, ALL_BASES[base], rho=0.1))
    assert found["param_groups"][0]["sam_step"] == 2


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("method", ALL_METHODS)
def test_every_option(method: str, option: str) -> None:
    check(lambda params: ALL_METHODS[method](params, BASES["adamw"], **OPTIONS[option]))


@pytest.mark.parametrize(
    ("dtype", "keeping"),
    [(dtype, name) for dtype in (torch.bfloat16, torch.float16) for name in keepings_of(dtype)],
    ids=str,
)
def test_every_way_to_keep_16_bits(dtype: torch.dtype, keeping: str) -> None:
    found = check(lambda params: WSAM(params, BASES["adamw"], **KEEPING[keeping]), dtype)
    assert ("master_weight" in found["state"][0]) == keeping.startswith("master")


def test_names_and_schedules() -> None:
    """A schedule is a function: the checkpoint has the number that it gave."""
    found = check(
        functools.partial(
            GSAM,
            base_optimizer=BASES["sgdm"],
            rho=ProportionalToLR(0.1, 0.02, lr_high=0.1),
            only_weights=True,
            geometry="adaptive",
        ),
        named=True,
    )
    assert found["param_groups"][0]["param_names"][0] == "weight0"
    assert found["param_groups"][0]["rho"] == pytest.approx(0.06)
    found = check(lambda params: SAM(params, BASES["adamw"], rho=InverseSqrt(0.5)))
    assert found["param_groups"][0]["rho"] == pytest.approx(0.5 / 2**0.5)


def test_a_learning_rate_that_is_a_tensor() -> None:
    base = functools.partial(torch.optim.AdamW, lr=torch.tensor(0.01))
    found = check(lambda params: WSAM(params, base))
    assert torch.equal(found["param_groups"][0]["lr"], torch.tensor(0.01))


def test_numbers_of_numpy_become_ordinary_ones() -> None:
    base = functools.partial(
        torch.optim.AdamW, lr=np.float32(0.5), betas=(np.float64(0.5), 0.9), eps=np.float64(1e-6)
    )
    found = check(lambda params: WSAM(params, base, rho=np.float64(0.25), gamma=np.float32(0.5)))
    group = found["param_groups"][0]
    assert [group[key] for key in ("lr", "betas", "rho", "gamma")] == [0.5, (0.5, 0.9), 0.25, 0.5]
    assert {type(group[key]) for key in ("lr", "eps", "rho", "gamma")} == {float}


def test_numbers_that_a_scheduler_computes_with_numpy() -> None:
    params = parameters("unaligned", torch.float64)
    optimizer = WSAM(params, BASES["adamw"])
    scheduler = LambdaLR(optimizer, lambda step: np.float64(1.0) / (step + 1))
    step(optimizer, params, 0)
    scheduler.step()
    assert isinstance(optimizer.param_groups[0]["lr"], np.float64)
    assert loaded(optimizer.state_dict())["param_groups"][0]["lr"] == pytest.approx(0.005)


def test_after_an_update_within_the_backward_and_a_look_at_the_telemetry() -> None:
    def trained() -> Any:
        torch.manual_seed(0)
        net = nn.Linear(3, 2).double()
        optimizer = WSAM(net.parameters(), BASES["adamw"])
        x = torch.randn(4, 3, dtype=torch.float64)

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss: torch.Tensor = net(x).square().mean()
            loss.backward()
            return loss

        with optimizer.update_in_backward():
            optimizer.step(closure)
        assert optimizer.last.sharpness.item() > 0
        return optimizer

    saved = trained().state_dict()
    assert bits(loaded(saved)) == bits(saved)
    twin = trained()
    twin.load_state_dict(loaded(saved))
    assert bits(twin.state_dict()) == bits(saved)


def test_weights_only_refuses_what_would_run_code(tmp_path: Any) -> None:
    """What this is for: a file that calls a function when it is read."""

    class Calls:
        def __reduce__(self) -> Any:
            return (open, (str(tmp_path / "called"), "w"))

    saved = WSAM(parameters("unaligned", torch.float64), BASES["adamw"]).state_dict()
    saved["param_groups"][0]["rho"] = Calls()
    with pytest.raises(Exception, match="Weights only load failed"):
        loaded(saved)
    assert not (tmp_path / "called").exists()
