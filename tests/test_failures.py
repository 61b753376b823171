"""Bad input and failures: a clear error, nothing lost, nothing left perturbed."""

from __future__ import annotations

import copy
import functools
import pickle
from typing import Any

import pytest
import torch
from cases import BASES, FOREIGN_BASES, METHODS, parameters, set_gradients, step
from torch.optim import SGD, AdamW

from wsam_fused import ESAM, GNP, GSAM, RWSAM, SAM, WSAM, _extension
from wsam_fused.gradients import GradientReader
from wsam_fused.tensor_list import TensorList

ALL_BASES = {**BASES, **FOREIGN_BASES}


def one() -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.randn(3, 2))]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"rho": -0.1}, ValueError, r"rho is -0.1, expected a number >= 0"),
        ({"rho": float("nan")}, ValueError, r"rho is nan, expected a number >= 0 and finite"),
        ({"rho": float("inf")}, ValueError, r"rho is inf, expected a number >= 0 and finite"),
        ({"rho": "big"}, TypeError, r"rho is 'big', expected a number"),
        ({"gamma": 1.0}, ValueError, r"gamma is 1.0, expected a number in \[0, 1\)"),
        ({"gamma": -0.1}, ValueError, r"gamma is -0.1, expected a number in \[0, 1\)"),
        ({"gamma": float("nan")}, ValueError, r"gamma is nan, expected a number in \[0, 1\)"),
        ({"eps": -1e-12}, ValueError, r"eps is -1e-12, expected a number >= 0"),
        ({"eps": float("inf")}, ValueError, r"eps is inf, expected a number >= 0"),
        ({"lr": -1.0}, ValueError, r"lr is -1.0, expected a number >= 0"),
        ({"lr": float("inf")}, ValueError, r"lr is inf, expected a number >= 0 and finite"),
        ({"lr": torch.ones(2)}, ValueError, r"lr is a tensor of 2 elements, expected one"),
        ({"weight_decay": -1.0}, ValueError, r"weight_decay is -1.0, expected a number >= 0"),
        ({"momentum": float("nan")}, ValueError, r"momentum is nan, expected a number >= 0"),
        ({"max_grad_norm": 0.0}, ValueError, r"max_grad_norm is 0.0, expected a number > 0"),
        ({"max_grad_norm": -1.0}, ValueError, r"max_grad_norm is -1.0, expected a number > 0"),
        ({"restore": "hope"}, ValueError, r"restore is 'hope', expected one of 'recompute'"),
        ({"backend": "tpu"}, ValueError, r"backend is 'tpu', expected one of 'auto'"),
        ({"model": "net"}, TypeError, r"model is str, expected a torch.nn.Module or None"),
        ({"nonsense": 1}, TypeError, r"nonsense"),
        ({"differentiable": True}, ValueError, r"differentiable is True, expected False"),
    ],
)
def test_a_wrong_argument_is_named(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        WSAM(one(), SGD, **{"lr": 0.1, **arguments})


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        ([], ValueError, "params is empty"),
        (torch.zeros(2), TypeError, "params is a Tensor"),
        ([torch.nn.Parameter(torch.zeros(2, dtype=torch.cfloat))], TypeError, "complex64"),
        ([torch.nn.Parameter(torch.zeros(1).expand(3))], ValueError, "share memory"),
    ],
    ids=["empty", "tensor", "complex", "overlapping"],
)
def test_wrong_parameters_are_refused(params: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SAM(params, SGD, lr=0.1)


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_a_parameter_twice_is_refused() -> None:
    (param,) = one()
    with pytest.raises(ValueError, match="twice"):
        SAM([param, param], SGD, lr=0.1)
    with pytest.raises(ValueError, match="more than one parameter group"):
        SAM([{"params": [param]}, {"params": [param]}], SGD, lr=0.1)


@pytest.mark.parametrize(
    ("method", "arguments", "message"),
    [
        (GSAM, {"alpha": -0.1}, r"alpha is -0.1, expected a number >= 0 and finite"),
        (GSAM, {"alpha": float("inf")}, r"alpha is inf, expected a number >= 0 and finite"),
        (GNP, {"alpha": 1.1}, r"alpha is 1.1, expected a number in \[0, 1\]"),
    ],
)
def test_a_method_checks_its_own_arguments(
    method: Any, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        method(one(), SGD, lr=0.1, **arguments)


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (torch.optim.LBFGS, "LBFGS, which evaluates the loss itself"),
        (torch.optim.SparseAdam, "SparseAdam, which needs sparse gradients"),
        (torch.nn.Linear, "expected a torch.optim.Optimizer class"),
        ("adam", "expected a torch.optim.Optimizer class"),
    ],
)
def test_a_wrong_base_optimizer_is_refused(base: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        SAM(one(), base)


def test_an_instance_has_to_fit() -> None:
    params = one()
    with pytest.raises(TypeError, match="has its arguments already; unexpected: lr"):
        SAM(params, SGD(params, lr=0.1), lr=0.1)
    with pytest.raises(ValueError, match=r"params has 1 parameters, expected the 2"):
        SAM(params, SGD([*params, *one()], lr=0.1))


def test_a_backend_that_does_not_support_the_parameters_is_an_error() -> None:
    param = torch.nn.Parameter(torch.zeros(3, dtype=torch.float8_e4m3fn), requires_grad=False)
    supported = "float32, float64, bfloat16, float16"
    with pytest.raises(ValueError, match=f"backend 'cpu' supports {supported} parameters"):
        SAM([param], SGD, lr=0.1, backend="cpu")


def test_a_backend_that_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wsam_fused._extension.UNAVAILABLE", "it is not built")
    with pytest.raises(RuntimeError, match="backend 'cpu' is not available: it is not built"):
        SAM(one(), SGD, lr=0.1, backend="cpu")
    params = one()
    optimizer = SAM(params, SGD, lr=0.1)
    step(optimizer, params, 0)
    assert optimizer.backend_of(params[0]) == "eager: cpu: it is not built"


def test_group_values_are_checked_when_added_and_when_changed(backend: str) -> None:
    params = parameters("unaligned", torch.float64)
    optimizer = WSAM(params[:2], SGD, lr=0.1, restore="backup", backend=backend)
    with pytest.raises(ValueError, match=r"rho is -1\.0"):
        optimizer.add_param_group({"params": params[2:], "rho": -1.0})
    assert len(optimizer.param_groups) == 1
    optimizer.param_groups[0]["gamma"] = 1.0
    set_gradients(params, 0)
    with pytest.raises(ValueError, match=r"gamma is 1.0, expected a number in \[0, 1\)"):
        optimizer.first_step()
    optimizer.param_groups[0]["gamma"] = 0.5
    before = [p.detach().clone() for p in params]
    optimizer.first_step(zero_grad=True)
    optimizer.param_groups[0]["lr"] = float("nan")
    with pytest.raises(ValueError, match="lr is nan"):
        optimizer.second_step()
    assert not optimizer.is_perturbed
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))


def test_calls_in_the_wrong_order(backend: str) -> None:
    params = parameters("unaligned", torch.float64)
    optimizer = WSAM(params, SGD, lr=0.1, backend=backend)
    with pytest.raises(RuntimeError, match=r"second_step\(\) was called before first_step"):
        optimizer.second_step()
    with pytest.raises(RuntimeError, match="nothing is pending"):
        optimizer.step()
    set_gradients(params, 0)
    optimizer.first_step()
    forbidden = {
        "first_step": optimizer.first_step,
        "step": lambda: optimizer.step(lambda: torch.zeros(())),
        "state_dict": optimizer.state_dict,
        "load_state_dict": lambda: optimizer.load_state_dict({}),
        "add_param_group": lambda: optimizer.add_param_group({"params": one()}),
        "pickling": lambda: pickle.dumps(optimizer),
        "copying": lambda: copy.deepcopy(optimizer),
    }
    for name, call in forbidden.items():
        with pytest.raises(RuntimeError, match=name):
            call()
    optimizer.second_step()
    optimizer.state_dict()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("when", [1, 2], ids=["first-closure", "second-closure"])
@pytest.mark.parametrize("base", ["adamw", "rmsprop"])
def test_an_exception_in_a_closure_restores_the_weights(
    base: str, when: int, error: type[BaseException], backend: str
) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    x = torch.randn(8, 3)
    optimizer = WSAM(
        model.parameters(), ALL_BASES[base], restore="backup", backend=backend, model=model
    )
    calls = 0

    def closure(fail_at: int = 0) -> torch.Tensor:
        nonlocal calls
        calls += 1
        optimizer.zero_grad()
        loss = model(x).square().sum()
        loss.backward()
        if calls == fail_at:
            raise error("boom")
        return loss

    optimizer.step(closure)
    calls = 0
    before = copy.deepcopy([*model.parameters(), optimizer.state_dict()])
    mean = model[1].running_mean.clone()
    with pytest.raises(error, match="boom"):
        optimizer.step(lambda: closure(when))
    assert not optimizer.is_perturbed
    for param, expected in zip(model.parameters(), before, strict=False):
        assert torch.equal(param, expected)
    for index, state in optimizer.state_dict()["state"].items():
        for key, value in state.items():
            assert torch.equal(value, before[-1]["state"][index][key])
    # Only the first, unperturbed pass may have been seen by the running statistics.
    expected_mean = 0.9 * mean + 0.1 * model[0](x).mean(0)
    torch.testing.assert_close(model[1].running_mean, expected_mean)
    calls = 0
    optimizer.step(closure)


@pytest.mark.parametrize("bad", ["sparse", "complex", "device"])
def test_a_wrong_gradient_is_refused_and_nothing_is_lost(bad: str, backend: str) -> None:
    params = [torch.nn.Parameter(torch.randn(4)), torch.nn.Parameter(torch.randn(3, 3))]
    optimizer = WSAM(params, SGD, lr=0.1, restore="backup", backend=backend)
    before = [p.detach().clone() for p in params]

    def spoil() -> None:
        if bad == "sparse":
            params[1].grad = torch.eye(3).to_sparse()
        elif bad == "complex":
            params[1].grad_dtype = None
            params[1].grad = torch.eye(3, dtype=torch.cfloat)
        else:
            params[1].grad_dtype = None
            params[1].grad = torch.eye(3).to(torch.float64)

    set_gradients(params, 0)
    spoil()
    if bad == "device":  # another precision is converted, not refused
        optimizer.first_step(zero_grad=True)
        optimizer.restore()
        return
    with pytest.raises(TypeError, match=rf"shape \(3, 3\) is .*{bad}"):
        optimizer.first_step(zero_grad=True)
    assert all(p.grad is not None for p in params), "the gradients are still there"
    set_gradients(params, 0)
    optimizer.first_step(zero_grad=True)
    set_gradients(params, 1)
    spoil()
    with pytest.raises(TypeError, match=rf"shape \(3, 3\) is .*{bad}"):
        optimizer.second_step()
    assert not optimizer.is_perturbed
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))


def test_no_gradient_at_all_is_an_error(backend: str) -> None:
    optimizer = WSAM(parameters("unaligned", torch.float64), SGD, lr=0.1, backend=backend)
    with pytest.raises(RuntimeError, match="none of the 4 parameters has a gradient"):
        optimizer.first_step()
    assert not optimizer.is_perturbed


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("eps", [1e-12, 0.0])
def test_a_zero_gradient_does_not_move_anything(eps: float, adaptive: bool, backend: str) -> None:
    params = parameters("unaligned", torch.float64)
    optimizer = WSAM(params, SGD, lr=0.1, eps=eps, adaptive=adaptive, backend=backend)
    before = [p.detach().clone() for p in params]
    for _ in range(2):
        for param in params:
            param.grad = torch.zeros_like(param)
        optimizer.step() if optimizer.is_perturbed else optimizer.first_step(zero_grad=True)
        assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
    assert optimizer.skipped_steps == 0


def state_of(optimizer: Any) -> list[torch.Tensor]:
    return [v.clone() for s in optimizer.state.values() for v in s.values() if v is not None]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("base", ["sgdm", "adamw", "rmsprop"])
@pytest.mark.parametrize("method", ["sam", "wsam", "coupled"])
@pytest.mark.parametrize("option", [{}, {"adaptive": True}, {"restore": "backup"}])
def test_a_non_finite_first_gradient_skips_the_step(
    option: dict[str, Any], method: str, base: str, value: float, backend: str
) -> None:
    params = parameters("unaligned", torch.float32)
    optimizer = METHODS[method](params, ALL_BASES[base], rho=0.3, backend=backend, **option)
    step(optimizer, params, 0)
    before = [p.detach().clone() for p in params], state_of(optimizer)
    set_gradients(params, 1)
    params[2].grad.view(-1)[0] = value  # type: ignore[union-attr]
    optimizer.first_step(zero_grad=True)
    assert all(torch.equal(p, b) for p, b in zip(params, before[0], strict=True))
    set_gradients(params, 2)
    optimizer.second_step()
    assert all(torch.equal(p, b) for p, b in zip(params, before[0], strict=True))
    assert all(torch.equal(s, b) for s, b in zip(state_of(optimizer), before[1], strict=True))
    assert optimizer.skipped_steps == 1
    step(optimizer, params, 3)
    assert not torch.equal(params[0], before[0][0])
    assert optimizer.skipped_steps == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("base", ["sgdm", "adamw", "rmsprop"])
@pytest.mark.parametrize("option", [{"check_finite": True}, {"max_grad_norm": 1.0}])
def test_a_non_finite_second_gradient_skips_the_step_where_it_is_checked(
    option: dict[str, Any], base: str, value: float, backend: str
) -> None:
    params = parameters("unaligned", torch.float32)
    optimizer = WSAM(params, ALL_BASES[base], rho=0.3, restore="backup", backend=backend, **option)
    step(optimizer, params, 0)
    before = [p.detach().clone() for p in params], state_of(optimizer)
    set_gradients(params, 1)
    optimizer.first_step(zero_grad=True)
    set_gradients(params, 2)
    params[0].grad[3] = value  # type: ignore[index]
    optimizer.second_step()
    assert all(torch.equal(p, b) for p, b in zip(params, before[0], strict=True))
    assert all(torch.equal(s, b) for s, b in zip(state_of(optimizer), before[1], strict=True))
    assert optimizer.skipped_steps == 1


def test_a_non_finite_second_gradient_enters_the_update_where_it_is_not_checked(
    backend: str,
) -> None:
    params = parameters("unaligned", torch.float32)
    optimizer = WSAM(params, SGD, lr=0.1, rho=0.3, backend=backend)
    set_gradients(params, 1)
    optimizer.first_step(zero_grad=True)
    set_gradients(params, 2)
    params[0].grad[3] = float("nan")  # type: ignore[index]
    optimizer.second_step()
    assert params[0][3].isnan()
    assert params[0].isnan().sum() == 1
    assert optimizer.skipped_steps == 0


def test_a_gradient_without_weight_does_not_poison_the_step(backend: str) -> None:
    """Gamma = 0: an inf in g2 must not become 0 * inf."""
    params = parameters("unaligned", torch.float32)
    optimizer = WSAM(params, AdamW, lr=0.1, gamma=0.0, backend=backend)
    set_gradients(params, 1)
    optimizer.first_step(zero_grad=True)
    set_gradients(params, 2)
    params[0].grad[3] = float("inf")  # type: ignore[index]
    optimizer.second_step()
    assert all(p.isfinite().all() for p in params)


def test_parameters_that_change_dtype_while_perturbed_are_an_error(backend: str) -> None:
    params = parameters("unaligned", torch.float32)
    optimizer = WSAM(params, SGD, lr=0.1, backend=backend)
    set_gradients(params, 0)
    optimizer.first_step(zero_grad=True)
    params[0].data = params[0].data.double()
    with pytest.raises(RuntimeError, match=r"became torch\.float64"):
        optimizer.second_step()


def test_failing_to_back_up_the_second_list_is_reported_as_such(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = [torch.nn.Parameter(torch.ones(5, dtype=d)) for d in (torch.float32, torch.float64)]
    optimizer = WSAM(params, torch.optim.SGD, lr=0.1, adaptive=True, backend=backend)
    for param in params:
        param.grad = torch.ones_like(param)
    make_backups = TensorList.make_backups

    def fail_for_float64(tensors: TensorList, reuse: bool) -> None:
        if tensors.key.dtype == torch.float64:
            raise MemoryError("no memory for a copy")
        make_backups(tensors, reuse)

    monkeypatch.setattr(TensorList, "make_backups", fail_for_float64)
    with pytest.raises(MemoryError, match="no memory for a copy"):
        optimizer.first_step(zero_grad=True)
    assert not optimizer.is_perturbed
    assert all(torch.equal(param, torch.ones_like(param)) for param in params)


def test_the_compiled_reader_notices_a_gradient_on_another_device() -> None:
    """Which ``grad.data = ...`` can bring: to a kernel its address would mean something else."""
    if _extension.READ_GRADIENTS is None:
        pytest.skip("the reader is not compiled")
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    set_gradients(params, 0)
    reader = GradientReader(params)
    assert reader._read_usual(take=False) is not None
    reader._device_index = 0  # as if the parameters were on a GPU
    assert reader._read_usual(take=True) is None
    assert all(param.grad is not None for param in params)


def test_parameters_that_share_memory_are_refused() -> None:
    block = torch.zeros(20)
    params = [torch.nn.Parameter(block[:11]), torch.nn.Parameter(block[10:])]
    with pytest.raises(ValueError, match=r"shapes \(11,\) and \(10,\) that share memory"):
        SAM([{"params": params[:1]}, {"params": params[1:]}], SGD, lr=0.1)
    # Side by side, and between each other's elements.
    separate = [block[:5], block[5:10], block[10:].view(5, 2)[:, 0], block[10:].view(5, 2)[:, 1]]
    SAM([torch.nn.Parameter(tensor) for tensor in separate], SGD, lr=0.1)


def test_parameters_that_come_to_share_memory_are_refused(backend: str) -> None:
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizer = SAM(params, SGD, lr=0.1, backend=backend)
    step(optimizer, params, 0)
    params[1].data = params[0].data
    set_gradients(params, 1)
    with pytest.raises(ValueError, match="share memory"):
        optimizer.first_step(zero_grad=True)
    assert all(param.grad is not None for param in params)


@pytest.mark.parametrize("name", ["rho", "weight_decay", "eps"])
def test_numbers_that_only_a_device_knows_are_refused(name: str, backend: str) -> None:
    params = parameters("unaligned", torch.float32)
    optimizer = SAM(params, AdamW, lr=0.1, backend=backend)
    step(optimizer, params, 0)
    optimizer.param_groups[0][name] = torch.tensor(0.1, device="meta")
    with pytest.raises(TypeError, match=f"{name} is a tensor on meta, expected a number"):
        step(optimizer, params, 1)
    assert not optimizer.is_perturbed


def test_a_group_whose_geometry_contradicts_itself() -> None:
    group = {"params": torch.nn.Linear(3, 2).parameters(), "adaptive": True, "geometry": "fisher"}
    with pytest.raises(ValueError, match=r"adaptive is True, .* but geometry is 'fisher'"):
        SAM([group], torch.optim.SGD, lr=0.1)


def losses_of(model: torch.nn.Module, index: torch.Tensor | None = None) -> torch.Tensor:
    losses: torch.Tensor = model(torch.ones(3 if index is None else len(index), 3)).sum(1)
    return losses


def test_a_share_of_zero_that_is_set_later_is_named() -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = ESAM(model.parameters(), torch.optim.SGD, lr=0.1)
    optimizer.param_groups[0]["beta"] = 0.0
    with pytest.raises(ValueError, match=r"beta is 0\.0, expected a number"):
        optimizer.step(functools.partial(losses_of, model))
    assert not optimizer.is_perturbed


@pytest.mark.parametrize("vanishing", [1, 2])
def test_gsam_without_eps_at_a_gradient_of_zero(vanishing: int, backend: str) -> None:
    model = torch.nn.Linear(3, 2)
    params = list(model.parameters())
    optimizer = GSAM(params, torch.optim.SGD, lr=0.1, eps=0.0, backend=backend)
    for evaluation in (1, 2):
        for param in params:
            param.grad = torch.full_like(param, 0.0 if evaluation == vanishing else 1.0)
        (optimizer.first_step if evaluation == 1 else optimizer.second_step)(zero_grad=True)
    assert all(bool(param.isfinite().all()) for param in params)


@pytest.mark.parametrize("method", [ESAM, RWSAM])
def test_losses_of_samples_where_gradients_are_off(method: Any) -> None:
    model = torch.nn.Linear(3, 2)
    before = [param.detach().clone() for param in model.parameters()]
    optimizer = method(model.parameters(), torch.optim.SGD, lr=0.1)
    with torch.no_grad():
        optimizer.step(functools.partial(losses_of, model))
    assert not any(map(torch.equal, model.parameters(), before))
