"""What of 16-bit parameters lives on: checkpoints, and what others do to a parameter."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from cases import (
    BASES,
    KEEPING,
    device_of,
    parameters,
    set_gradients,
    step,
)
from precision_cases import BACKEND, DTYPE

from wsam_fused import SAM, WSAM
from wsam_fused.precision import MASTER_KEY


@BACKEND
@DTYPE
@pytest.mark.parametrize("keeping", ["master", "narrow", "master-narrow"])
def test_checkpoints_go_on_exactly(keeping: str, dtype: torch.dtype, name: str) -> None:
    def new() -> tuple[list[torch.nn.Parameter], Any]:
        torch.manual_seed(3)
        params = parameters("unaligned", dtype, device_of(name))
        return params, WSAM(params, BASES["adamw"], backend=name, **KEEPING[keeping])

    params, optimizer = new()
    for number in range(2):
        step(optimizer, params, number)
    other_params, other = new()
    with torch.no_grad():
        for param, source in zip(other_params, params, strict=True):
            param.copy_(source)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for number in range(2, 4):
        step(optimizer, params, number)
        step(other, other_params, number)
    for param, expected in zip(other_params, params, strict=True):
        assert torch.equal(param, expected)
        for key, value in optimizer.state[expected].items():
            assert torch.equal(other.state[param][key], value), key
            assert other.state[param][key].dtype == value.dtype, key


@DTYPE
def test_master_weights_come_and_go_with_checkpoints(dtype: torch.dtype) -> None:
    params = parameters("unaligned", dtype)
    with_masters = WSAM(params, BASES["adamw"], master_weights=True)
    step(with_masters, params, 0)
    without = WSAM(params, BASES["adamw"])
    without.load_state_dict(with_masters.state_dict())
    step(without, params, 1)
    assert MASTER_KEY not in without.state[params[0]], "it would not follow"
    again = WSAM(params, BASES["adamw"], master_weights=True)
    again.load_state_dict(without.state_dict())
    step(again, params, 2)
    assert torch.equal(again.state[params[0]][MASTER_KEY].to(dtype), params[0])


@BACKEND
@DTYPE
def test_what_others_write_to_a_parameter_is_followed(dtype: torch.dtype, name: str) -> None:
    params = parameters("unaligned", dtype, device_of(name))
    optimizer = WSAM(params, BASES["sgd"], rho=0.1, master_weights=True, backend=name)
    step(optimizer, params, 0)
    masters = [optimizer.state[param][MASTER_KEY].clone() for param in params]
    with torch.no_grad():
        params[1][3] = 100.0
    optimizer.param_groups[0]["lr"] = 0.0
    step(optimizer, params, 1)
    for i, (param, before) in enumerate(zip(params, masters, strict=True)):
        if i == 1:
            before[3] = 100.0
        assert torch.equal(optimizer.state[param][MASTER_KEY], before)
        assert torch.equal(param, before.to(dtype))


def test_wider_parameters_are_as_always() -> None:
    params = parameters("unaligned", torch.float32)
    optimizer = WSAM(
        params, BASES["adamw"], master_weights=True, state_dtype="parameter", restore="backup"
    )
    step(optimizer, params, 0)
    assert MASTER_KEY not in optimizer.state[params[0]]
    assert optimizer.state[params[0]]["exp_avg"].dtype == torch.float32


@BACKEND
@pytest.mark.parametrize("ends_by", ["restore", "closure"])
def test_what_others_write_survives_a_step_that_fails(ends_by: str, name: str) -> None:
    params = parameters("unaligned", torch.bfloat16, device_of(name))
    optimizer = WSAM(params, BASES["sgd"], master_weights=True, backend=name)
    step(optimizer, params, 0)
    with torch.no_grad():
        params[1].fill_(3.0)
    if ends_by == "restore":
        optimizer.restore()
    else:
        with pytest.raises(RuntimeError, match="out of memory"):
            optimizer.step(_out_of_memory)
    optimizer.param_groups[0]["lr"] = 0.0
    step(optimizer, params, 1)
    assert (params[1] == 3.0).all()
    assert (optimizer.state[params[1]][MASTER_KEY] == 3.0).all()


def _out_of_memory() -> None:
    raise RuntimeError("out of memory")


@BACKEND
def test_a_layout_that_changes_while_perturbed(name: str) -> None:
    param = torch.nn.Parameter(torch.randn(8, 4, 3, 3).to(device_of(name), torch.bfloat16))
    optimizer = SAM([param], BASES["sgd"], rho=0.5, master_weights=True, backend=name)
    step(optimizer, [param], 0)
    before, master = param.detach().clone(), optimizer.state[param][MASTER_KEY].clone()
    set_gradients([param], 1)
    optimizer.first_step(zero_grad=True)
    param.data = param.data.to(memory_format=torch.channels_last)
    optimizer.restore()
    assert torch.equal(param, before)
    optimizer.param_groups[0]["lr"] = 0.0
    step(optimizer, [param], 2)
    assert torch.equal(param, before)
    assert torch.equal(optimizer.state[param][MASTER_KEY], master)


def test_chance_goes_on_from_a_checkpoint_and_with_new_tables() -> None:
    """SGD has no count of its own in a checkpoint; what chance takes follows from the group's."""
    results = []
    for interrupted in (False, True):
        torch.manual_seed(0)
        params = parameters("unaligned", torch.bfloat16)
        optimizer = SAM(params, BASES["sgd"], stochastic_rounding=True)
        for number in range(4):
            if interrupted and number == 2:
                state = copy.deepcopy(optimizer.state_dict())
                optimizer = SAM(params, BASES["sgd"], stochastic_rounding=True)
                optimizer.load_state_dict(state)
            if interrupted and number == 3:
                params[0].data = params[0].data.clone()  # makes new tables
            step(optimizer, params, number)
        results.append(torch.cat([param.detach().flatten() for param in params]))
    assert torch.equal(*results)


def test_checkpoints_load_before_all_states_exist() -> None:
    params = parameters("unaligned", torch.bfloat16)
    options = {"master_weights": True, "check_finite": True}
    optimizer = SAM(params, BASES["sgdm-dampened"], **options)
    for call in (optimizer.first_step, optimizer.second_step):
        set_gradients(params, 0)
        params[0].grad[0] = float("nan")  # type: ignore[index]
        call(zero_grad=True)
    again = SAM(params, BASES["sgdm-dampened"], **options)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    step(again, params, 1)
    assert again.state[params[0]]["momentum_buffer"] is not None


def test_wider_parameters_drop_the_weights_of_a_checkpoint() -> None:
    low = parameters("unaligned", torch.bfloat16)
    optimizer = WSAM(low, BASES["adamw"], master_weights=True)
    step(optimizer, low, 0)
    wide = [torch.nn.Parameter(param.detach().float()) for param in low]
    other = WSAM(wide, BASES["adamw"], master_weights=True)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    step(other, wide, 1)
    assert all(MASTER_KEY not in other.state[param] for param in wide)
