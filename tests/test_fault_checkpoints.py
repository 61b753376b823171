"""The fault matrix, checkpoints: saving changes nothing, loading everything or nothing."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from cases import BASES, FOREIGN_BASES, step
from torch import Tensor, nn

from benchmarks.reliability.fault_injection import ERRORS
from wsam_fused import SAM, WSAM, checkpoints

ALL_BASES = {**BASES, **FOREIGN_BASES}
DTYPES = (torch.float32, torch.bfloat16)
METHODS: dict[str, Any] = {"sam": SAM, "wsam": WSAM}


def training(method: str, base: str, backend: str, seed: int) -> tuple[list[Any], Any]:
    generator = torch.Generator().manual_seed(seed)
    params = [nn.Parameter(torch.randn(7, 2, generator=generator).to(d)) for d in DTYPES]
    options = {} if base in FOREIGN_BASES else {"master_weights": True}
    optimizer = METHODS[method](
        params, ALL_BASES[base], rho=0.2, restore="backup", backend=backend, **options
    )
    for number in range(2):
        step(optimizer, params, 10 * seed + number)
    return params, optimizer


def tensors(params: list[Any], optimizer: Any) -> list[Tensor]:
    states = [v for p in params for v in optimizer.state[p].values()]
    return [torch.as_tensor(one).detach().clone() for one in [*params, *states]]


def fail_in(where: str, optimizer: Any, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise ERRORS[kind]()

    if where == "pre-hook":
        optimizer.register_load_state_dict_pre_hook(fail)
    elif where == "post-hook":  # torch calls it when the state has been exchanged
        optimizer.register_load_state_dict_post_hook(fail)
    elif where == "casting":
        name = "_process_value_according_to_param_policy"
        monkeypatch.setattr(torch.optim.Optimizer, name, staticmethod(fail))
    else:
        monkeypatch.setattr(checkpoints, "keep_wide_states", fail)


@pytest.mark.parametrize("kind", ERRORS)
@pytest.mark.parametrize("where", ["pre-hook", "casting", "wide states", "post-hook"])
@pytest.mark.parametrize(
    ("method", "base"), [("sam", "adamw"), ("wsam", "sgdm-dampened"), ("wsam", "rmsprop")]
)
def test_loading_that_fails_changes_nothing(
    method: str, base: str, where: str, kind: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if base in FOREIGN_BASES and where == "wide states":
        pytest.skip("a foreign base optimizer has no wider states")
    _, other = training(method, base, backend, 1)
    params, optimizer = training(method, base, backend, 2)
    twin_params, twin = training(method, base, backend, 2)
    checkpoint = copy.deepcopy(other.state_dict())
    checkpoint["param_groups"][0]["lr"] = 0.5
    before = tensors(params, optimizer)
    lr = optimizer.param_groups[0]["lr"]
    with monkeypatch.context() as patch:
        fail_in(where, optimizer, kind, patch)
        with pytest.raises(type(ERRORS[kind]()), match="injected"):
            optimizer.load_state_dict(checkpoint)
    assert all(map(torch.equal, tensors(params, optimizer), before))
    assert optimizer.param_groups[0]["lr"] == lr
    assert optimizer._base.state is optimizer.state
    assert optimizer._base.param_groups is optimizer.param_groups
    for one, of in ((params, optimizer), (twin_params, twin)):
        step(of, one, 99)
    assert all(map(torch.equal, tensors(params, optimizer), tensors(twin_params, twin)))


@pytest.mark.parametrize("kind", ERRORS)
@pytest.mark.parametrize("where", ["pre-hook", "post-hook"])
@pytest.mark.parametrize("base", ["adamw", "sgdm-dampened", "rmsprop"])
def test_saving_that_fails_changes_nothing(base: str, where: str, kind: str, backend: str) -> None:
    params, optimizer = training("wsam", base, backend, 2)
    twin_params, twin = training("wsam", base, backend, 2)

    def fail(*arguments: Any) -> None:
        raise ERRORS[kind]()

    before = tensors(params, optimizer)
    hooks = {
        "pre-hook": optimizer.register_state_dict_pre_hook,
        "post-hook": optimizer.register_state_dict_post_hook,
    }
    handle = hooks[where](fail)
    with pytest.raises(type(ERRORS[kind]()), match="injected"):
        optimizer.state_dict()
    handle.remove()
    assert all(map(torch.equal, tensors(params, optimizer), before))
    for one, of in ((params, optimizer), (twin_params, twin)):
        step(of, one, 99)
    assert all(map(torch.equal, tensors(params, optimizer), tensors(twin_params, twin)))
