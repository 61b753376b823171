"""A malformed checkpoint is refused, and then parameters, state and groups are bitwise as before.

First one case for everything that can be wrong, with what the error says; then valid checkpoints of
which hypothesis exchanges, drops or adds something anywhere. What is accepted can be stepped with.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import BASES, FOREIGN_BASES, METHODS, parameters, set_gradients, step
from hypothesis import given, settings
from hypothesis import strategies as st
from test_checkpoint_checks import everything, same
from torch import Tensor

from wsam_fused import GSAM, SAM, WSAM

NAN, INF = float("nan"), float("inf")
ALL_BASES = {**BASES, **FOREIGN_BASES}
Change = Callable[[dict[str, Any]], Any]


@functools.cache
def trained(base: str) -> Any:
    """An optimizer after one step, for tests that leave it as it is."""
    torch.manual_seed(0)
    params = parameters("unaligned", torch.float64)
    optimizer = METHODS["wsam"](params, ALL_BASES[base])
    step(optimizer, params, 0)
    return optimizer


def bits(value: Any) -> Any:
    """The same, with bytes in place of tensors: NaN equals NaN then, and 0 is not -0."""
    if isinstance(value, Tensor):
        return value.dtype, value.shape, value.detach().clone().numpy().tobytes()
    if isinstance(value, dict):
        return {key: bits(each) for key, each in value.items()}
    return [bits(each) for each in value] if isinstance(value, list | tuple) else repr(value)


def in_group(**values: Any) -> Change:
    return lambda saved: saved["param_groups"][0].update(values)


def in_state(**values: Any) -> Change:
    return lambda saved: saved["state"][1].update(values)


def without(path: str) -> Change:
    """Drop what is at a path such as ``state/1/step``."""

    def change(saved: Any) -> None:
        *outer, last = [int(key) if key.isdigit() else key for key in path.split("/")]
        for key in outer:
            saved = saved[key]
        del saved[last]

    return change


def converted(convert: Callable[[Tensor], Tensor]) -> Change:
    return lambda saved: saved["state"][1].update(exp_avg=convert(saved["state"][1]["exp_avg"]))


def sharing(saved: dict[str, Any]) -> None:
    block = torch.zeros(1100, dtype=torch.float64)
    saved["state"][1].update(exp_avg=block[:1023], exp_avg_sq=block[7:1030])


def of_two_parameters(saved: dict[str, Any]) -> None:
    block = torch.zeros(1023, dtype=torch.float64)
    saved["state"][0]["exp_avg"], saved["state"][1]["exp_avg_sq"] = block[:17], block


WRONG_FORMS: dict[str, tuple[Any, str]] = {
    "text": ("checkpoint", "state_dict is of type str, expected what"),
    "nothing": (None, "state_dict is of type NoneType"),
    "list": ([], "state_dict is of type list"),
    "no keys": ({}, "state_dict has no 'state'"),
    "no groups": ({"state": {}}, "state_dict has no 'param_groups'"),
    "groups are text": ({"state": {}, "param_groups": "x"}, "'param_groups' .* of type str"),
    "no group": ({"state": {}, "param_groups": []}, "has 0 parameter groups, expected 1"),
    "group is text": ({"state": {}, "param_groups": ["x"]}, "group 0 .* is of type str"),
    "state is a list": ({"state": [], "param_groups": [{"params": []}]}, "'state' .* type list"),
}

WRONG_PARTS: dict[str, tuple[Change, str]] = {
    "a group more": (
        lambda saved: saved["param_groups"].append(saved["param_groups"][0]),
        "has 2 parameter groups, expected 1",
    ),
    "no params": (without("param_groups/0/params"), "group 0 of the checkpoint has no 'params'"),
    "params is nothing": (in_group(params=None), "'params' of .* is of type NoneType"),
    "params of lists": (in_group(params=[[0], 1, 2, 3]), "has an entry of type list"),
    "params twice": (in_group(params=[0, 1, 1, 3]), "has parameter 1 again, expected each once"),
    "too few params": (in_group(params=[0, 1, 2]), "state for parameter 3, which none"),
    "too many params": (in_group(params=[0, 1, 2, 3, 4]), "doesn't match the size"),
    "other numbers": (in_group(params=[10, 11, 12, 13]), "state for parameter 0, which none"),
    "names of numbers": (in_group(param_names=[0, 1, 2, 3]), "'param_names' of .* a list of names"),
    "few names": (in_group(param_names=["a"]), "has 1 'param_names', expected 4"),
    "state of nobody": (lambda saved: saved["state"].update({9: {}}), "state for parameter 9"),
    "state with a name": (lambda saved: saved["state"].update(x={}), "state for parameter 'x'"),
    "state is text": (lambda saved: saved["state"].update({1: "x"}), "parameter 1 is of type str"),
    "lr as text": (in_group(lr="0.1"), "lr is '0.1', expected a number"),
    "lr negative": (in_group(lr=-1.0), "lr is -1.0, expected a number >= 0"),
    "rho not finite": (in_group(rho=NAN), "rho is nan, expected a number >= 0"),
    "rho beyond floats": (in_group(rho=10**400), "rho is inf, expected a number >= 0"),
    "rho an object": (in_group(rho=object()), "rho is <object .*expected a number"),
    "rho complex": (in_group(rho=torch.tensor(1j)), "rho is tensor.*expected a number"),
    "rho without data": (in_group(rho=torch.tensor(1.0, device="meta")), "rho is tensor"),
    "rho three numbers": (in_group(rho=torch.ones(3)), "rho is a tensor of 3 elements"),
    "rho a function": (in_group(rho=len), "rho is <built-in function len>, expected a number"),
    "gamma of 1": (in_group(gamma=1.0), r"gamma is 1.0, expected a number in \[0, 1\)"),
    "no such geometry": (in_group(geometry="x"), "geometry is 'x', expected one of"),
    "steps negative": (in_group(sam_step=-1), "sam_step of the checkpoint is -1.0, expected"),
    "half a step": (in_group(sam_step=1.5), "sam_step .* is 1.5, expected a whole number"),
    "steps as text": (in_group(sam_step="1"), "sam_step .* is '1', expected a number"),
    "one beta": (in_group(betas=(0.9,)), r"betas is \(0.9,\), expected two numbers in \[0, 1\)"),
    "beta of 2": (in_group(betas=(0.9, 2.0)), r"betas is 2.0, expected a number in \[0, 1\)"),
    "beta not finite": (in_group(betas=(NAN, 0.9)), "betas is nan, expected a number in"),
    "eps negative": (in_group(eps=-1.0), "eps is -1.0, expected a number >= 0"),
    "amsgrad as text": (in_group(amsgrad="no"), "amsgrad is 'no', expected True or False"),
    "maximize as text": (in_group(maximize="no"), "maximize is 'no', expected True or False"),
    "no count": (without("state/1/step"), "'step' of parameter 1 is None, expected a number"),
    "count not finite": (in_state(step=torch.tensor(NAN)), "'step' of parameter 1 is nan"),
    "count infinite": (in_state(step=torch.tensor(INF)), "'step' of parameter 1 is inf"),
    "count negative": (in_state(step=torch.tensor(-1.0)), "'step' of parameter 1 is -1.0"),
    "half a count": (in_state(step=1.5), "'step' .* is 1.5, expected a whole number"),
    "count as text": (in_state(step="1"), "'step' of parameter 1 is '1', expected a number"),
    "many counts": (in_state(step=torch.zeros(2)), "'step' .* is a tensor of 2 elements"),
    "state as text": (in_state(exp_avg="x"), "'exp_avg' of parameter 1 is str, expected a tensor"),
    "state of lists": (in_state(exp_avg=[0.0] * 1023), "'exp_avg' of parameter 1 is list"),
    "state transposed": (converted(lambda t: t.view(1, -1)), r"is \(1, 1023\), expected"),
    "state complex": (converted(lambda t: t.to(torch.complex128)), "is torch.complex128"),
    "state sparse": (converted(lambda t: t.to_sparse()), "is torch.sparse_coo, expected an ordin"),
    "state without data": (converted(lambda t: t.to("meta")), "is without data, expected an ordin"),
    "states share memory": (sharing, r"shapes \(1023,\) and \(1023,\) share memory"),
    "and of two parameters": (of_two_parameters, r"shapes \(.*\) and \(.*\) share memory"),
}


@pytest.mark.parametrize("name", WRONG_FORMS)
@pytest.mark.parametrize("base", ["adamw", "rmsprop"])
def test_what_is_no_checkpoint_is_refused(base: str, name: str) -> None:
    optimizer = trained(base)
    before = bits(everything(optimizer))
    wrong, message = WRONG_FORMS[name]
    with pytest.raises((TypeError, ValueError), match=message):
        optimizer.load_state_dict(wrong)
    assert bits(everything(optimizer)) == before


@pytest.mark.parametrize("name", WRONG_PARTS)
def test_a_part_that_is_wrong_is_refused(name: str) -> None:
    optimizer = trained("adamw")
    before = bits(everything(optimizer))
    saved = copy.deepcopy(optimizer.state_dict())
    change, message = WRONG_PARTS[name]
    change(saved)
    with pytest.raises((TypeError, ValueError), match=message):
        optimizer.load_state_dict(saved)
    assert bits(everything(optimizer)) == before


@pytest.mark.parametrize(
    ("values", "message"),
    [({"dampening": NAN}, "dampening is nan"), ({"nesterov": 2}, "nesterov is 2, expected True")],
)
def test_a_group_of_sgd_that_is_wrong_is_refused(values: dict[str, Any], message: str) -> None:
    optimizer = trained("sgdm")
    before = bits(everything(optimizer))
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0].update(values)
    with pytest.raises((TypeError, ValueError), match=message):
        optimizer.load_state_dict(saved)
    assert bits(everything(optimizer)) == before


def test_the_second_of_two_groups_is_checked_too() -> None:
    params = parameters("unaligned", torch.float64)
    optimizer = GSAM([{"params": params[:2]}, {"params": params[2:]}], BASES["adamw"])
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][1]["alpha"] = -1.0
    before = bits(everything(optimizer))
    with pytest.raises(ValueError, match=r"alpha is -1.0, expected a number >= 0"):
        optimizer.load_state_dict(saved)
    assert bits(everything(optimizer)) == before
    saved["param_groups"][1].update(alpha=0.5, params=[1, 2])
    with pytest.raises(ValueError, match="group 1 of the checkpoint has parameter 1 again"):
        optimizer.load_state_dict(saved)


def test_a_float32_weight_that_is_the_parameter_is_refused() -> None:
    params = parameters("unaligned", torch.float32)
    optimizer = SAM(params, BASES["sgdm"])
    step(optimizer, params, 0)
    saved = optimizer.state_dict()
    saved["state"][2] = {"momentum_buffer": params[2].detach()}
    with pytest.raises(ValueError, match=r"states or parameters of shapes .* share memory"):
        optimizer.load_state_dict(saved)


def test_a_foreign_base_optimizer_may_keep_something_under_a_name() -> None:
    """What torch hands through, for an optimizer that has a state of no parameter."""
    optimizer = copy.deepcopy(trained("rmsprop"))
    saved = optimizer.state_dict()
    saved["state"]["global"] = {"count": 3}
    optimizer.load_state_dict(saved)
    assert optimizer.state_dict()["state"]["global"] == {"count": 3}
    saved["state"][9] = {}
    with pytest.raises(ValueError, match="state for parameter 9, which none of its groups has"):
        optimizer.load_state_dict(saved)


def test_values_that_others_add_are_kept() -> None:
    optimizer = copy.deepcopy(trained("adamw"))
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["name"] = "all"
    saved["state"][1]["average"] = torch.ones(1023, dtype=torch.float64)
    optimizer.load_state_dict(saved)
    params = optimizer.param_groups[0]["params"]
    step(optimizer, params, 1)
    assert optimizer.param_groups[0]["name"] == "all"
    assert torch.equal(optimizer.state_dict()["state"][1]["average"], torch.ones_like(params[1]))


# ---- anything exchanged anywhere -----------------------------------------------------------------

JUNK = st.sampled_from(
    [
        *(None, True, -1, 0, 3, 2**70, 0.5, NAN, INF, 1j, "", "x", b"x", (), [], {}, [0], [NAN]),
        *(object(), len, torch.float32, (0.5, 0.5), (0.9, NAN), {"step": 1}, range(3)),
        *(torch.tensor(2.0), torch.tensor(NAN), torch.tensor(-3), torch.tensor(1j)),
        *(torch.tensor([]), torch.ones(3), torch.ones(1023, dtype=torch.float64)),
        *(torch.ones(1, dtype=torch.float64).expand(1023), torch.ones(1023).to_sparse()),
        *(torch.ones(1023, dtype=torch.int8), torch.empty(1023, device="meta")),
    ]
)
ACTIONS = st.sampled_from(["exchange", "exchange", "drop", "add", "double"])


def mutate(data: st.DataObject, saved: Any) -> None:
    """Walk down from the outermost dictionary, and stop somewhere to change something."""
    place = saved
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        action = data.draw(ACTIONS)
        if action == "add" or not keys:
            new, value = data.draw(st.sampled_from([0, 7, "extra", "step", "params"])), JUNK
            if isinstance(place, dict):
                place[new] = data.draw(value)
            else:
                place.append(data.draw(value))
            return
        key = data.draw(st.sampled_from(keys))
        if isinstance(place[key], dict | list) and data.draw(st.integers(0, 7)):
            place = place[key]
            continue
        if action == "drop":
            del place[key]
        elif action == "double":
            place[data.draw(st.sampled_from(keys))] = place[key]
        else:
            place[key] = data.draw(JUNK)
        return


@pytest.mark.parametrize("base", ["sgdm-dampened", "adamw", "amsgrad", "rmsprop"])
@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data())
def test_a_changed_checkpoint_is_refused_whole_or_can_be_stepped_with(
    base: str, data: st.DataObject
) -> None:
    optimizer = trained(base)
    saved = copy.deepcopy(optimizer.state_dict())
    for _ in range(data.draw(st.integers(1, 2))):
        mutate(data, saved)
    params = [torch.nn.Parameter(p.detach().clone()) for p in optimizer.param_groups[0]["params"]]
    twin = WSAM(params, ALL_BASES[base])
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    before = bits(everything(twin))
    try:
        twin.load_state_dict(saved)
    except (TypeError, ValueError):
        assert bits(everything(twin)) == before
        step(twin, params, 1)
        return
    if base != "rmsprop":  # what torch makes of a wrong state there is its own
        step(twin, params, 1)
        assert not twin.is_perturbed


def test_the_reference_of_these_tests_can_tell_one_bit() -> None:
    params = parameters("unaligned", torch.float64)
    set_gradients(params, 1)
    before = bits([p.detach() for p in params])
    with torch.no_grad():
        params[1][3] = torch.nextafter(params[1][3], params[1][3] + 1)
    assert bits([p.detach() for p in params]) != before
    assert same([torch.tensor(0.0)], [torch.tensor(-0.0)])
    assert bits([torch.tensor(0.0)]) != bits([torch.tensor(-0.0)])
