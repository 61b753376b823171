"""What users of torch.optim expect of any optimizer, and what this one adds."""

from __future__ import annotations

import copy
import functools
import gc
import pickle
import warnings
import weakref
from typing import Any

import pytest
import torch
from cases import BASES, FOREIGN_BASES, METHODS, parameters, set_gradients, step
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    ExponentialLR,
    LambdaLR,
    OneCycleLR,
    ReduceLROnPlateau,
    StepLR,
)

from wsam_fused import SAM, WSAM


def regression(seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Any, Any]:
    """A small network and a function that makes its closures."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(
        torch.nn.Linear(4, 8, bias=False),  # BatchNorm makes its gradient rounding noise
        torch.nn.BatchNorm1d(8),
        torch.nn.Tanh(),
        torch.nn.Linear(8, 2),
    ).to(dtype)
    x, y = torch.randn(16, 4, dtype=dtype), torch.randn(16, 2, dtype=dtype)

    def closure_of(optimizer: Any) -> Any:
        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = torch.nn.functional.mse_loss(model(x), y)
            loss.backward()
            return loss

        return closure

    return model, closure_of


def weights(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def test_the_line_of_existing_scripts_works_unchanged() -> None:
    model, closure_of = regression()
    optimizer = SAM(
        model.parameters(),
        torch.optim.SGD,
        rho=2.0,
        adaptive=True,
        lr=0.1,
        momentum=0.9,
        weight_decay=5e-4,
    )
    closure = closure_of(optimizer)
    closure()
    optimizer.first_step(zero_grad=True)
    closure()
    optimizer.second_step(zero_grad=True)
    assert all(p.grad is None for p in model.parameters())
    assert isinstance(optimizer, torch.optim.Optimizer)


def test_step_returns_the_first_loss_and_lowers_it(backend: str) -> None:
    model, closure_of = regression()
    optimizer = WSAM(model.parameters(), AdamW, lr=1e-2, backend=backend)
    closure = closure_of(optimizer)
    expected = closure().item()
    losses = [optimizer.step(closure).item() for _ in range(30)]
    assert losses[0] == pytest.approx(expected, rel=1e-12)
    assert losses[-1] < 0.5 * losses[0]


def test_closure_form_and_two_call_form_are_the_same(backend: str) -> None:
    results = []
    for form in ("closure", "two calls", "step completes"):
        model, closure_of = regression()
        optimizer = WSAM(model.parameters(), SGD, lr=0.1, momentum=0.9, backend=backend)
        closure = closure_of(optimizer)
        for _ in range(3):
            if form == "closure":
                optimizer.step(closure)
                continue
            closure()
            optimizer.first_step(zero_grad=True)
            closure()
            optimizer.second_step() if form == "two calls" else optimizer.step()
        results.append(weights(model))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("flow", ["left over", "keeps none", "zeroed", "kept and cleared"])
def test_gradient_flows_give_the_same_result(flow: str, backend: str) -> None:
    """Whatever a script does with .grad, g1 and g2 are the gradients of one evaluation each."""
    results = []
    for current in ("reference", flow):
        model, closure_of = regression()
        optimizer = WSAM(model.parameters(), SGD, lr=0.1, backend=backend)
        closure = closure_of(optimizer)
        if current == "left over":  # a backward before step(closure), as some READMEs have it
            closure()
            with pytest.warns(UserWarning, match="backward before step.closure. is wasted"):
                optimizer.step(functools.partial(closure_without_clearing, closure_of))
        elif current == "zeroed":  # zero_grad(set_to_none=False) inside the closure
            optimizer.step(functools.partial(zeroing_closure, optimizer, closure_of))
        elif current == "kept and cleared":
            closure()
            optimizer.first_step(zero_grad=False)
            assert all(p.grad is not None for p in model.parameters())
            optimizer.zero_grad(set_to_none=False)
            closure()
            optimizer.second_step()
        else:
            optimizer.step(closure)
        results.append(weights(model))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-15)


def closure_without_clearing(closure_of: Any) -> torch.Tensor:
    class Keeps:
        zero_grad = staticmethod(lambda: None)

    loss: torch.Tensor = closure_of(Keeps)()
    return loss


def zeroing_closure(optimizer: Any, closure_of: Any) -> torch.Tensor:
    class Zeroes:
        zero_grad = staticmethod(lambda: optimizer.zero_grad(set_to_none=False))

    loss: torch.Tensor = closure_of(Zeroes)()
    return loss


@pytest.mark.parametrize(
    "make",
    [
        lambda o: StepLR(o, 2, gamma=0.1),
        lambda o: ExponentialLR(o, 0.5),
        lambda o: CosineAnnealingLR(o, 5),
        lambda o: LambdaLR(o, lambda epoch: 0.3**epoch),
        lambda o: OneCycleLR(o, 0.1, total_steps=8),
        lambda o: ReduceLROnPlateau(o, patience=0, threshold=10.0),
    ],
    ids=["step", "exponential", "cosine", "lambda", "one-cycle", "plateau"],
)
@pytest.mark.parametrize("tensor_lr", [False, True], ids=["float", "tensor"])
@pytest.mark.parametrize("base", [SGD, AdamW, torch.optim.RMSprop], ids=lambda b: b.__name__)
def test_schedulers(make: Any, tensor_lr: bool, base: Any, backend: str) -> None:
    """Gamma = 0 is the base optimizer, whatever the scheduler does to lr, momentum and betas."""
    results = []
    for ours in (True, False):
        model, closure_of = regression()
        lr = torch.tensor(0.05, dtype=torch.float64) if tensor_lr else 0.05
        extra = {"momentum": 0.9} if base is not AdamW else {}
        if ours:
            optimizer: Any = WSAM(
                model.parameters(), base, gamma=0.0, backend=backend, lr=lr, **extra
            )
        else:
            optimizer = base(model.parameters(), lr=lr, **extra)
        scheduler = make(optimizer)
        for _ in range(5):
            loss = optimizer.step(closure_of(optimizer))
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # "called before optimizer.step()"
                plateau = isinstance(scheduler, ReduceLROnPlateau)
                scheduler.step(loss.detach()) if plateau else scheduler.step()
        results.append(weights(model))
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-13)


def test_scheduler_does_not_warn_in_the_two_call_form() -> None:
    model, closure_of = regression()
    optimizer = SAM(model.parameters(), SGD, lr=0.1)
    scheduler = StepLR(optimizer, 1)
    closure_of(optimizer)()
    optimizer.first_step(zero_grad=True)
    closure_of(optimizer)()
    optimizer.second_step(zero_grad=True)
    scheduler.step()  # warnings are errors here


def test_hyper_parameters_are_read_at_every_step(backend: str) -> None:
    for key, value in (("rho", 0.0), ("gamma", 0.0), ("lr", 0.0)):
        results = []
        for changed in (False, True):
            params = parameters("unaligned", torch.float64)
            torch.manual_seed(0)
            optimizer = WSAM(params, SGD, rho=0.3, gamma=0.8, lr=0.1, backend=backend)
            step(optimizer, params, 0)
            if changed:
                optimizer.param_groups[0][key] = value
            before = [p.detach().clone() for p in params]
            step(optimizer, params, 1)
            results.append(torch.cat([p.detach() - b for p, b in zip(params, before, strict=True)]))
        if key != "rho":  # these gradients do not depend on where they are evaluated
            assert not torch.equal(*results)
    assert results[1].abs().max() <= 1e-15, "lr = 0 moves nothing but the rounding of the restore"


def test_groups_and_add_param_group(backend: str) -> None:
    params = parameters("sizes", torch.float64)
    optimizer = WSAM(
        [{"params": params[:2], "rho": 0.0, "lr": 0.5}], SGD, lr=0.1, rho=0.3, backend=backend
    )
    step(optimizer, params[:2], 0)
    optimizer.add_param_group({"params": params[2:5], "gamma": 0.0})
    optimizer.add_param_group({"params": iter(params[5:])})
    group = optimizer.param_groups
    assert [g["rho"] for g in group] == [0.0, 0.3, 0.3]
    assert [g["gamma"] for g in group] == [0.9, 0.0, 0.9]
    assert [g["lr"] for g in group] == [0.5, 0.1, 0.1]
    before = [p.detach().clone() for p in params]
    step(optimizer, params, 1)
    assert not any(torch.equal(p, b) for p, b in zip(params, before, strict=True) if p.numel())


def test_named_parameters_and_a_generator_are_accepted() -> None:
    model, _ = regression()
    optimizer = SAM(model.named_parameters(), SGD, lr=0.1)
    assert optimizer.param_groups[0]["param_names"][0] == "0.weight"
    assert len(SAM((p for p in model.parameters()), SGD, lr=0.1).param_groups[0]["params"]) == 5


@pytest.mark.parametrize("base", [*BASES, *FOREIGN_BASES])
def test_gamma_0_and_rho_0_are_the_base_optimizer(base: str, backend: str) -> None:
    build = {**BASES, **FOREIGN_BASES}[base]
    for options in ({"gamma": 0.0, "rho": 0.3}, {"gamma": 0.9, "rho": 0.0}):
        model, closure_of = regression()
        twin, twin_closure_of = regression()
        ours = WSAM(model.parameters(), build, backend=backend, **options)
        theirs = build(twin.parameters())
        for _ in range(6):
            ours.step(closure_of(ours))
            theirs.step(twin_closure_of(theirs))
        torch.testing.assert_close(weights(model), weights(twin), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("form", ["class", "partial", "instance"])
@pytest.mark.parametrize("base", [AdamW, torch.optim.RMSprop], ids=["fused", "foreign"])
def test_forms_of_a_base_optimizer(base: Any, form: str, backend: str) -> None:
    results = []
    for current in ("class", form):
        model, closure_of = regression()
        if current == "class":
            optimizer = WSAM(model.parameters(), base, lr=0.01, backend=backend)
        elif current == "partial":
            bound = functools.partial(base, lr=0.01)
            optimizer = WSAM(model.parameters(), bound, backend=backend)
        else:
            instance = base(model.parameters(), lr=0.01)
            optimizer = WSAM(model.parameters(), instance, backend=backend)
            assert optimizer.param_groups is instance.param_groups
            assert optimizer.state is instance.state
        for _ in range(3):
            optimizer.step(closure_of(optimizer))
        results.append(weights(model))
    assert torch.equal(*results)


def test_a_key_of_a_foreign_base_is_not_ours() -> None:
    model, _ = regression()
    bound = functools.partial(torch.optim.Adadelta, rho=0.8)
    group = SAM(model.parameters(), bound, rho=0.3).param_groups[0]
    assert (group["rho"], group["sam_rho"]) == (0.8, 0.3)


@pytest.mark.parametrize("missing", ["both", "first", "second"])
@pytest.mark.parametrize("base", ["sgdm", "adamw", "rmsprop"])
def test_a_parameter_without_a_gradient_is_left_alone(
    base: str, missing: str, backend: str
) -> None:
    """Without one in either evaluation: no update, no decay, no state; perturbed: restored."""
    params = parameters("unaligned", torch.float64)
    build = {**BASES, **FOREIGN_BASES}[base]
    optimizer = WSAM(params, build, rho=0.3, restore="backup", backend=backend)
    before = [p.detach().clone() for p in params]
    set_gradients(params, 0)
    if missing != "second":
        params[1].grad = None
    optimizer.first_step(zero_grad=True)
    assert torch.equal(params[1], before[1]) == (missing != "second")
    set_gradients(params, 1)
    if missing != "first":
        params[1].grad = None
    optimizer.second_step(zero_grad=True)
    assert torch.equal(params[1], before[1])
    assert not torch.equal(params[0], before[0])
    state = optimizer.state[params[1]]
    assert all(not value.any() for value in state.values())


def test_frozen_parameters_have_no_state_until_they_are_trained(backend: str) -> None:
    params = parameters("unaligned", torch.float64)
    params[2].requires_grad_(False)
    optimizer = WSAM(params, AdamW, lr=0.01, backend=backend)
    trained = [p for p in params if p.requires_grad]
    step(optimizer, trained, 0)
    assert params[2] not in optimizer.state
    params[2].requires_grad_(True)
    step(optimizer, params, 1)
    assert optimizer.state[params[2]]["step"] == 1
    assert optimizer.state[params[0]]["step"] == 2


def test_bfloat16_parameters_are_restored_from_a_copy() -> None:
    params = [torch.nn.Parameter(torch.randn(50).bfloat16())]
    optimizer = WSAM(params, SGD, lr=0.1)
    before = params[0].detach().clone()
    set_gradients(params, 0)
    optimizer.first_step(zero_grad=True)
    assert not torch.equal(params[0], before)
    optimizer.restore()
    assert torch.equal(params[0], before), "restored from a backup without asking"
    assert optimizer.backend_of(params[0]).startswith("cpu:")


def test_parameters_that_move_are_followed(backend: str) -> None:
    results = []
    for moves in (False, True):
        torch.manual_seed(0)
        params = parameters("unaligned", torch.float64)
        optimizer = WSAM(params, AdamW, lr=0.1, backend=backend)
        for number in range(3):
            set_gradients(params, 2 * number)
            if moves:
                params[0].data = params[0].data.clone()
            optimizer.first_step(zero_grad=True)
            if moves:  # as a layer that renormalizes its weight in forward
                params[1].data = params[1].data.clone()
            set_gradients(params, 2 * number + 1)
            optimizer.second_step()
        results.append(torch.cat([p.detach() for p in params]))
    assert torch.equal(*results)


def test_autograd_notices_that_the_weights_changed(backend: str) -> None:
    weight = torch.nn.Parameter(torch.randn(3, 3))
    optimizer = SAM([weight], SGD, lr=0.1, backend=backend)
    loss = (weight @ weight).sum()
    loss.backward(retain_graph=True)
    optimizer.first_step(zero_grad=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    optimizer.restore()


def test_a_gradient_that_is_a_view_is_copied(backend: str) -> None:
    """Its owner writes to it again in the next backward, as DDP does with its buckets."""
    results = []
    for as_views in (False, True):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(5)), torch.nn.Parameter(torch.randn(7))]
        optimizer = WSAM(params, SGD, lr=0.1, gamma=0.5, backend=backend)
        bucket = torch.randn(12, generator=torch.Generator().manual_seed(1))
        views = [bucket[:5], bucket[5:]]
        for param, view in zip(params, views, strict=True):
            param.grad = view if as_views else view.clone()
        optimizer.first_step(zero_grad=True)
        bucket.copy_(torch.randn(12, generator=torch.Generator().manual_seed(2)))
        for param, view in zip(params, views, strict=True):
            param.grad = view
        optimizer.second_step()
        results.append(torch.cat([p.detach() for p in params]))
    assert torch.equal(*results)


def test_pickle_and_deepcopy_continue_alike(backend: str) -> None:
    model, closure_of = regression()
    optimizer = WSAM(model.parameters(), AdamW, lr=0.01, gamma=0.7, decouple=False, backend=backend)
    optimizer.step(closure_of(optimizer))
    clones = [pickle.loads(pickle.dumps(optimizer)), copy.deepcopy(optimizer)]
    step(optimizer, list(model.parameters()), 5)
    for clone in clones:
        params = clone.param_groups[0]["params"]
        assert clone.decouple is False
        step(clone, params, 5)
        assert torch.equal(torch.cat([p.detach().reshape(-1) for p in params]), weights(model))


def test_batch_norm_statistics_stay_out_of_the_perturbed_pass() -> None:
    model, closure_of = regression()
    twin, twin_closure_of = regression()
    optimizer = SAM(model.parameters(), SGD, lr=0.0, rho=0.5, model=model)
    optimizer.step(closure_of(optimizer))
    plain = SGD(twin.parameters(), lr=0.0)
    plain.step(twin_closure_of(plain))
    ours, expected = dict(model.named_buffers()), dict(twin.named_buffers())
    assert ours["1.num_batches_tracked"] == 1
    for name, value in expected.items():
        assert torch.equal(ours[name], value), name


def test_telemetry_is_of_the_last_step(backend: str) -> None:
    model, closure_of = regression()
    optimizer = WSAM(model.parameters(), SGD, lr=0.0, rho=0.1, backend=backend)
    closure = closure_of(optimizer)
    assert optimizer.last.grad_norm is None
    loss = optimizer.step(closure)
    closure()
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()  # type: ignore[union-attr]
    torch.testing.assert_close(optimizer.last.grad_norm, norm)
    assert torch.equal(optimizer.last.loss, loss.detach())
    # Along the gradient the loss rises by about rho times its norm.
    assert optimizer.last.sharpness == pytest.approx(0.1 * norm.item(), rel=0.5)


def test_nothing_keeps_a_dropped_optimizer_alive() -> None:
    params = parameters("unaligned", torch.float32)
    optimizer = METHODS["wsam"](params, BASES["adamw"])
    step(optimizer, params, 0)
    watched = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert watched() is None
