"""What a user or a layer may change between the two evaluations, or between two steps."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from cases import BASES, parameters, set_gradients, step
from torch.optim import SGD, AdamW

from wsam_fused import SAM, WSAM


class Rebinding(torch.optim.Optimizer):
    """SGD that gives its parameters other memory, as some optimizers do."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    param.data = param.data - group["lr"] * param.grad


def test_the_restore_uses_the_radius_of_the_perturbation(backend: str) -> None:
    params = parameters("unaligned", torch.float64)
    before = [p.detach().clone() for p in params]
    optimizer = WSAM(params, SGD, lr=0.0, rho=0.5, backend=backend)
    set_gradients(params, 0)
    optimizer.first_step(zero_grad=True)
    optimizer.param_groups[0]["rho"] = 0.1
    set_gradients(params, 1)
    optimizer.second_step()
    for param, expected in zip(params, before, strict=True):
        torch.testing.assert_close(param.detach(), expected, rtol=1e-14, atol=1e-14)


def test_maximize_may_not_change_while_perturbed(backend: str) -> None:
    params = parameters("unaligned", torch.float64)
    optimizer = WSAM(params, SGD, lr=0.1, restore="backup", backend=backend)
    before = [p.detach().clone() for p in params]
    set_gradients(params, 0)
    optimizer.first_step(zero_grad=True)
    optimizer.param_groups[0]["maximize"] = True
    with pytest.raises(RuntimeError, match="maximize was changed"):
        optimizer.second_step()
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))


def test_looking_at_a_step_in_progress_does_not_disturb_it(backend: str) -> None:
    params = parameters("unaligned", torch.float64)
    params[3].requires_grad_(False)
    optimizer = WSAM(params, SGD, lr=0.1, restore="backup", backend=backend)
    before = [p.detach().clone() for p in params]
    set_gradients(params[:3], 0)
    optimizer.first_step(zero_grad=True)
    params[3].grad = torch.ones_like(params[3])  # would make the lists outdated
    optimizer.param_groups[0]["momentum"] = 0.9
    assert optimizer.skipped_steps == 0
    optimizer.backend_of(params[0])
    assert optimizer.is_perturbed
    optimizer.restore()
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))


def test_a_parameter_that_shrinks_in_place_is_noticed(backend: str) -> None:
    """Pruning may keep the address; the table must not keep the size."""
    param = torch.nn.Parameter(torch.randn(100))
    optimizer = SAM([param], SGD, lr=0.1, adaptive=True, backend=backend)
    step(optimizer, [param], 0)
    param.data = param.data[:10]
    step(optimizer, [param], 1)
    assert optimizer.last.grad_norm is not None
    set_gradients([param], 2)
    torch.testing.assert_close(optimizer.last.grad_norm, param.grad.double().norm())  # type: ignore[union-attr]

    with_state = WSAM([param], AdamW, lr=0.1, backend=backend)
    step(with_state, [param], 0)
    param.data = param.data[:5]
    set_gradients([param], 1)
    with pytest.raises(ValueError, match=r"state 'exp_avg' is \(10,\)"):
        with_state.first_step()


@pytest.mark.parametrize("restore", ["recompute", "backup"])
def test_another_memory_format_between_the_evaluations(restore: str, backend: str) -> None:
    """The kernels cannot go on with it: an error, and the weights are back."""
    param = torch.nn.Parameter(torch.randn(4, 3, 5, 5, dtype=torch.float64))
    optimizer = WSAM([param], AdamW, lr=0.1, rho=0.5, restore=restore, backend=backend)
    step(optimizer, [param], 0)
    before = param.detach().clone()
    set_gradients([param], 1)
    optimizer.first_step(zero_grad=True)
    param.data = param.data.to(memory_format=torch.channels_last)
    set_gradients([param], 2)
    with pytest.raises(RuntimeError, match="change parameters between steps"):
        optimizer.second_step()
    torch.testing.assert_close(param.detach(), before, rtol=1e-14, atol=1e-14)
    step(optimizer, [param], 2)  # between steps it may change
    assert optimizer.state[param]["exp_avg"].stride() == param.stride()


def test_a_base_optimizer_that_rebinds_the_data(backend: str) -> None:
    results = []
    for base in (Rebinding, SGD):
        torch.manual_seed(0)
        params = parameters("unaligned", torch.float64)
        optimizer = WSAM(params, functools.partial(base, lr=0.1), rho=0.3, backend=backend)
        for number in range(3):
            step(optimizer, params, number)
        results.append(torch.cat([p.detach() for p in params]))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-13)


def test_adding_a_group_keeps_what_is_known(backend: str) -> None:
    params = parameters("unaligned", torch.float64)
    optimizer = SAM(params[:3], BASES["sgdm-dampened"], rho=0.0, backend=backend)
    set_gradients(params[:1], 0)
    params[0].grad[0] = float("nan")  # type: ignore[index]
    optimizer.first_step(zero_grad=True)
    set_gradients(params[:1], 0)
    optimizer.second_step(zero_grad=True)
    assert optimizer.skipped_steps == 1
    optimizer.add_param_group({"params": params[3:]})
    clone = copy.deepcopy(optimizer)
    assert optimizer.skipped_steps == 1
    for one in (optimizer, clone):  # nothing was updated yet: this is the undampened first step
        params = [p for group in one.param_groups for p in group["params"]]
        before = [p.detach().clone() for p in params]
        step(one, params, 1)
        set_gradients(params, 3)
        for param, w in zip(params, before, strict=True):
            expected = w - 0.05 * param.grad
            torch.testing.assert_close(param.detach(), expected, rtol=1e-12, atol=1e-13)


def test_an_instance_stays_linked_after_loading(backend: str) -> None:
    params = parameters("unaligned", torch.float64)
    base = AdamW(params, lr=0.1)
    optimizer = WSAM(params, base, backend=backend)
    step(optimizer, params, 0)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    base.param_groups[0]["lr"] = 0.5
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert base.state is optimizer.state


def test_a_state_that_was_cleared_starts_again(backend: str) -> None:
    params = parameters("unaligned", torch.float64)
    optimizer = WSAM(params, AdamW, lr=0.1, backend=backend)
    step(optimizer, params, 0)
    optimizer.state.clear()
    step(optimizer, params, 1)
    assert optimizer.state[params[0]]["step"] == 1


def test_losses_are_those_of_the_last_step(backend: str) -> None:
    params = parameters("unaligned", torch.float64)
    optimizer = WSAM(params, SGD, lr=0.1, backend=backend)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = sum((p * p).sum() for p in params)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert optimizer.last.loss is not None
    step(optimizer, params, 1)
    assert optimizer.last.loss is None
    assert optimizer.last.sharpness is None


@pytest.mark.parametrize("layout", ["unaligned", "strided"])
def test_steps_are_the_same_without_the_compiled_reader(
    layout: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where Python's headers were missing, the gradients are read in Python."""
    results = []
    for compiled in (True, False):
        if not compiled:
            monkeypatch.setattr("wsam_fused._extension.READ_GRADIENTS", None)
        torch.manual_seed(0)
        params = parameters(layout, torch.float64)
        optimizer = WSAM(params, AdamW, lr=0.1, restore="backup", backend=backend)
        for number in range(2):
            step(optimizer, params, number)
        with pytest.raises(RuntimeError, match="none of the 4 parameters has a gradient"):
            optimizer.first_step()
        set_gradients(params[1:], 9)
        optimizer.first_step(zero_grad=True)
        assert all(p.grad is None for p in params)
        optimizer.restore()
        results.append(torch.cat([p.detach().reshape(-1) for p in params]))
    assert torch.equal(*results)
