"""Checkpoints: of this optimizer, and to and from the base optimizer."""

from __future__ import annotations

import functools
import io
from typing import Any

import pytest
import torch
from cases import BASES, FOREIGN_BASES, parameters, set_gradients, step
from tolerances import ONE_STEP, close

from wsam_fused import SAM, WSAM

ALL_BASES = {**BASES, **FOREIGN_BASES}


def saved_and_loaded(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


def flat(params: list[torch.nn.Parameter]) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1) for p in params])


@pytest.mark.parametrize("base", ALL_BASES)
def test_training_continues_from_a_checkpoint(base: str, backend: str) -> None:
    params = parameters("sizes", torch.float64)
    optimizer = WSAM(params, ALL_BASES[base], rho=0.2, gamma=0.8, backend=backend)
    step(optimizer, params, 0)
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    twin = WSAM(twins, ALL_BASES[base], rho=9.0, gamma=0.1, backend=backend)
    twin.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    assert twin.param_groups[0]["gamma"] == 0.8
    for number in (1, 2):
        step(optimizer, params, number)
        step(twin, twins, number)
        assert torch.equal(flat(params), flat(twins))


@pytest.mark.parametrize("base", ALL_BASES)
def test_a_checkpoint_of_the_base_optimizer_loads_and_goes_back(base: str, backend: str) -> None:
    """Base -> ours -> base: gamma = 0 and rho = 0 continue the base optimizer's run."""
    params = parameters("unaligned", torch.float64)
    plain = ALL_BASES[base](params)
    set_gradients(params, 1)
    plain.step()
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    ours = WSAM(twins, ALL_BASES[base], rho=0.0, gamma=0.0, backend=backend)
    ours.load_state_dict(saved_and_loaded(plain.state_dict()))
    assert ours.param_groups[0]["gamma"] == 0.0, "keys that the checkpoint lacks keep their values"
    set_gradients(params, 2 * 2)
    plain.step()
    step(ours, twins, 2)  # g1 has the seed 4, and g2 has no weight
    close(flat(twins), flat(params), ONE_STEP[torch.float64], "base to ours")

    back = ALL_BASES[base]([torch.nn.Parameter(p.detach().clone()) for p in twins])
    back.load_state_dict(saved_and_loaded(ours.state_dict()))
    for param in back.param_groups[0]["params"]:
        expected = plain.state[params[0]].keys()
        assert back.state[param].keys() == expected
    for target in (params, back.param_groups[0]["params"]):
        set_gradients(target, 7)
    plain.step()
    back.step()
    moved = flat(back.param_groups[0]["params"])
    torch.testing.assert_close(moved, flat(params), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("base", ["sgd", "sgdm", "adamw", "adamw-amsgrad"])
def test_state_has_the_keys_of_torch_and_nothing_else(base: str, backend: str) -> None:
    params = parameters("unaligned", torch.float32)
    optimizer = WSAM(params, BASES[base], backend=backend)
    step(optimizer, params, 0)
    plain = BASES[base](params)
    set_gradients(params, 1)
    plain.step()
    for param in params:
        assert list(optimizer.state[param]) == [
            key for key, value in plain.state[param].items() if value is not None
        ]
        assert all(
            value.shape == param.shape or key == "step"
            for key, value in optimizer.state[param].items()
        )


def test_dampening_skips_only_the_first_update_after_a_round_trip(backend: str) -> None:
    """A parameter without a gradient so far has not had its first, undampened update."""
    params = parameters("unaligned", torch.float64)
    optimizer = SAM(params, BASES["sgdm-dampened"], backend=backend)
    step(optimizer, params[:2], 0)
    saved = saved_and_loaded(optimizer.state_dict())
    assert saved["state"][3]["momentum_buffer"] is None
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    twin = SAM(twins, BASES["sgdm-dampened"], backend=backend)
    twin.load_state_dict(saved)
    step(optimizer, params, 1)
    step(twin, twins, 1)
    assert torch.equal(flat(params), flat(twins))


def test_a_state_of_the_wrong_shape_is_refused_before_anything_changes(backend: str) -> None:
    params = parameters("unaligned", torch.float64)
    optimizer = WSAM(params, BASES["adamw"], backend=backend)
    step(optimizer, params, 0)
    optimizer.state[params[1]]["exp_avg"] = torch.zeros(3)
    optimizer._engine.lists.stale = True
    before = flat(params).clone()
    set_gradients(params, 5)
    with pytest.raises(ValueError, match=r"state 'exp_avg' is \(3,\), expected .* \(1023,\)"):
        optimizer.first_step()
    assert torch.equal(flat(params), before)
    assert all(p.grad is not None for p in params)


def test_groups_that_do_not_match_are_refused() -> None:
    params = parameters("unaligned", torch.float64)
    saved = WSAM(params[:2], BASES["adamw"]).state_dict()
    with pytest.raises(ValueError, match="doesn't match"):
        WSAM(params, BASES["adamw"]).load_state_dict(saved)


def test_momentum_of_a_foreign_base_optimizer_is_in_the_checkpoint(backend: str) -> None:
    params = parameters("unaligned", torch.float32)
    base = functools.partial(torch.optim.RMSprop, lr=0.01, momentum=0.9)
    optimizer = SAM(params, base, backend=backend)
    step(optimizer, params, 0)
    for param, entry in zip(params, optimizer.state_dict()["state"].values(), strict=True):
        assert torch.equal(entry["momentum_buffer"], optimizer.state[param]["momentum_buffer"])
        assert entry["momentum_buffer"].any()
