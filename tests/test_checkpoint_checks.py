"""A checkpoint that does not fit is refused before anything of it is taken over."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import BASES, FOREIGN_BASES, METHODS, parameters, set_gradients, step
from torch.optim import SGD, Adam, AdamW

from wsam_fused import ESAM, SAM, WSAM

ALL_BASES = {**BASES, **FOREIGN_BASES}


def trained(method: Any, base: Any, dtype: torch.dtype = torch.float64) -> Any:
    params = parameters("unaligned", dtype)
    optimizer = method(params, base)
    step(optimizer, params, 0)
    return optimizer


def everything(optimizer: Any) -> list[Any]:
    params = [param for group in optimizer.param_groups for param in group["params"]]
    state = [dict(optimizer.state[param]) for param in params]
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    return copy.deepcopy([[param.detach() for param in params], state, groups])


def same(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right)


def without(*keys: str) -> Callable[[dict[str, Any]], None]:
    def change(saved: dict[str, Any]) -> None:
        for key in keys:
            del saved["state"][2][key]

    return change


def with_state(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(saved: dict[str, Any]) -> None:
        saved["state"][2][key] = value

    return change


WRONG_OPTIMIZERS = [
    ("sam", "adamw", r"the checkpoint is of SAM, expected one of WSAM or of its base .* AdamW"),
    ("gsam", "adamw", "the checkpoint is of GSAM"),
    ("wsam", "sgdm", r"another base optimizer than AdamW: its groups have no .*'betas'"),
    ("wsam", "sgd", "another base optimizer than AdamW"),
    ("wsam", "rmsprop", "another base optimizer than AdamW"),
    ("wsam", "adam", "AdamW: decoupled_weight_decay is False, expected True"),
]


@pytest.mark.parametrize(("method", "base", "message"), WRONG_OPTIMIZERS)
def test_a_checkpoint_of_another_optimizer_is_refused(method: str, base: str, message: str) -> None:
    optimizer = trained(METHODS["wsam"], BASES["adamw"])
    saved = trained(METHODS[method], ALL_BASES[base]).state_dict()
    before = everything(optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    assert same(everything(optimizer), before)


@pytest.mark.parametrize("base", [SGD, Adam, torch.optim.RMSprop])
def test_a_checkpoint_of_another_plain_optimizer_is_refused(base: Any) -> None:
    optimizer = trained(METHODS["wsam"], BASES["adamw"])
    plain = base(parameters("unaligned", torch.float64))
    with pytest.raises(ValueError, match="another base optimizer than AdamW"):
        optimizer.load_state_dict(plain.state_dict())


WRONG_STATES = [
    ("adamw", with_state("exp_avg", torch.zeros(3)), r"'exp_avg' of parameter 2 is \(3,\)"),
    ("adamw", without("exp_avg_sq"), "state 'exp_avg_sq' of parameter 2 is missing"),
    ("amsgrad", without("max_exp_avg_sq"), "'max_exp_avg_sq' of parameter 2 is missing"),
    ("adamw", with_state("exp_avg", 0.5), "'exp_avg' of parameter 2 is float"),
    ("sgdm", with_state("momentum_buffer", torch.zeros(2)), "'momentum_buffer' of parameter 2"),
]


@pytest.mark.parametrize(("base", "change", "message"), WRONG_STATES)
def test_a_wrong_state_is_refused(base: str, change: Any, message: str) -> None:
    optimizer = trained(METHODS["wsam"], BASES[base])
    saved = copy.deepcopy(optimizer.state_dict())
    change(saved)
    before = everything(optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    assert same(everything(optimizer), before)


@pytest.mark.parametrize("wrong", [torch.float32, torch.int64, torch.bool])
def test_a_state_of_another_dtype_is_refused(wrong: torch.dtype) -> None:
    optimizer = trained(METHODS["wsam"], BASES["adamw"])
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["exp_avg"] = saved["state"][0]["exp_avg"].to(wrong)
    message = f"'exp_avg' of parameter 0 is {wrong}, expected torch.float64"
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)


def test_low_precision_takes_wide_and_low_states() -> None:
    """Those of torch.optim.AdamW over bfloat16 parameters are bfloat16."""
    params = parameters("unaligned", torch.bfloat16)
    plain = AdamW(params, lr=0.1)
    set_gradients(params, 1)
    plain.step()
    for saved in (plain.state_dict(), trained(SAM, AdamW, torch.bfloat16).state_dict()):
        optimizer = SAM(parameters("unaligned", torch.bfloat16), AdamW)
        optimizer.load_state_dict(saved)
        assert optimizer.state_dict()["state"][0]["exp_avg"].dtype == torch.float32


def test_a_subclass_of_a_user_loads_what_its_base_class_saved() -> None:
    class Mine(WSAM):
        pass

    saved = trained(METHODS["wsam"], BASES["adamw"]).state_dict()
    mine = Mine(parameters("unaligned", torch.float64), BASES["adamw"])
    mine.load_state_dict(saved)
    assert mine.param_groups[0]["sam_step"] == 1
    assert mine.param_groups[0]["sam_method"] == "WSAM"


# ---- a state that is asked for before the first step ---------------------------------------------


def ask_for_state(optimizer: Any, gradient: float = 0.0, lr: float = 0.0) -> None:
    """Do what torch.distributed.checkpoint does with an optimizer that has no state."""
    for group in optimizer.param_groups:
        group["lr"] = lr
        for param in group["params"]:
            param.grad = torch.full_like(param, gradient)
    optimizer.step(closure=None)


@pytest.mark.parametrize("base", ["sgdm", "adamw", "amsgrad", "rmsprop"])
def test_a_step_that_would_change_nothing_creates_the_state(base: str, backend: str) -> None:
    params = parameters("sizes", torch.float64)
    optimizer = SAM(params, ALL_BASES[base], backend=backend)
    before = [param.detach().clone() for param in params]
    ask_for_state(optimizer)
    assert all(map(torch.equal, params, before))
    assert optimizer.param_groups[0]["sam_step"] == 0
    plain = ALL_BASES[base](params)
    set_gradients(params, 1)
    plain.step()
    for param in params:
        wanted = {key for key, value in plain.state[param].items() if value is not None}
        assert optimizer.state[param].keys() == wanted
    for entry in optimizer.state_dict()["state"].values():
        assert all(isinstance(value, torch.Tensor) for value in entry.values())


@pytest.mark.parametrize(
    "arguments", [{"gradient": 1.0}, {"lr": 0.1}, {"gradient": float("nan")}], ids=str
)
def test_any_other_step_without_closure_is_an_error(arguments: dict[str, float]) -> None:
    optimizer = SAM(parameters("unaligned", torch.float64), BASES["adamw"])
    with pytest.raises(RuntimeError, match="nothing is pending"):
        ask_for_state(optimizer, **arguments)
    assert not optimizer.state


def test_with_a_state_it_is_an_error_too() -> None:
    optimizer = trained(SAM, BASES["adamw"])
    with pytest.raises(RuntimeError, match="nothing is pending"):
        ask_for_state(optimizer)


def test_per_sample_methods_create_their_state_as_well() -> None:
    params = parameters("unaligned", torch.float64)
    optimizer = functools.partial(ESAM, rho=0.1)(params, BASES["adamw"])
    with pytest.raises(TypeError, match="expected a function"):
        optimizer.step(None)
    ask_for_state(optimizer)
    assert optimizer.state.keys() == set(params)
