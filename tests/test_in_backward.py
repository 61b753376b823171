"""Updates within the second backward, beside the step that updates after it.

The operations are the same; only the norm is added up in another order, list by list. Where the
sums are exact (gradients of integers), so is the comparison.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import device_of
from comparison import compare_and_align
from in_backward_cases import (
    BASES,
    METHODS,
    OPTIONS,
    PER_SAMPLE,
    Net,
    Separate,
    chain,
    chain_loss,
    closure_of,
    values_of,
)
from interpreted import interpreted_backend
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from benchmarks import readme
from wsam_fused import SAM, WSAM
from wsam_fused.backends import BACKENDS
from wsam_fused.buckets import in_buckets
from wsam_fused.methods import METHODS as METHODS_OF_ALL
from wsam_fused.tensor_list import ListKey

AdamW = torch.optim.AdamW
TRITON = interpreted_backend()


def pair(build: Any, make: Any) -> list[tuple[Any, Any]]:
    """Two equal nets with optimizers, of which the second updates in the backward."""
    pairs = []
    for in_backward in (False, True):
        net = build()
        optimizer = make(net.parameters())
        if in_backward:
            optimizer.update_in_backward()
        pairs.append((net, optimizer))
    return pairs


# ---- it is the same step ---------------------------------------------------------------------


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("method", METHODS)
def test_bits_are_those_of_the_ordinary_step(method: str, base: str, backend: str) -> None:
    results = []
    pairs = pair(
        lambda: Separate(backend),
        lambda params: METHODS[method](params, BASES[base], rho=0.1, backend=backend),
    )
    for net, optimizer in pairs:
        before = values_of(net.parameters())
        optimizer.step(closure_of(net, optimizer))
        assert not any(map(torch.equal, before, net.parameters()))
        states = [optimizer.state[p] for p in net.parameters()]
        results.append([*values_of(net.parameters()), *(t for s in states for t in s.values())])
    assert len(pairs[1][1]._engine.lists.lists) > len(pairs[0][1]._engine.lists.lists)
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("method", ["sam", "wsam"])
def test_training_equals_the_ordinary_one(method: str, options: str, backend: str) -> None:
    (net, ordinary), (other, optimizer) = pair(
        lambda: Net().to(device_of(backend)),
        lambda params: METHODS[method](
            params, BASES["adamw"], backend=backend, every=2, **OPTIONS[options]
        ),
    )
    for number in range(4):
        losses = [one.step(closure_of(m, one)) for m, one in ((net, ordinary), (other, optimizer))]
        torch.testing.assert_close(*losses)
        if number % 2:  # a sharpness-aware step
            assert all(p.grad is None for p in other.parameters())
            torch.testing.assert_close(optimizer.last.grad_norm, ordinary.last.grad_norm)
            assert optimizer.last.second_grad_norm is None
        compare_and_align(optimizer, ordinary, torch.float32, f"step {number}")
    assert torch.equal(other.unused, torch.ones(3))


@pytest.mark.parametrize("method", PER_SAMPLE)
def test_methods_with_losses_of_samples(method: str, backend: str) -> None:
    (net, ordinary), (other, optimizer) = pair(
        Net, lambda params: PER_SAMPLE[method](params, BASES["adamw"], rho=0.1, backend=backend)
    )
    for number in range(3):
        losses = ordinary.step(net.losses), optimizer.step(other.losses)
        torch.testing.assert_close(*losses)
        compare_and_align(optimizer, ordinary, torch.float32, f"step {number}")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype, backend: str) -> None:
    if BACKENDS[backend].DTYPES and dtype not in BACKENDS[backend].DTYPES:
        pytest.skip(f"{backend} has no {dtype}")
    (net, ordinary), (other, optimizer) = pair(
        lambda: Net(dtype), lambda params: WSAM(params, AdamW, lr=0.01, backend=backend)
    )
    for number in range(2):
        for m, one in ((net, ordinary), (other, optimizer)):
            one.step(closure_of(m, one))
        compare_and_align(optimizer, ordinary, dtype, f"step {number}")


@pytest.mark.skipif(TRITON.unavailable() is not None, reason=str(TRITON.unavailable()))
@pytest.mark.parametrize("options", OPTIONS)
def test_triton_kernels(options: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, "triton-interpreted", TRITON)
    (net, ordinary), (other, optimizer) = pair(
        Net,
        lambda params: WSAM(
            params, AdamW, lr=0.01, backend="triton-interpreted", **OPTIONS[options]
        ),
    )
    for number in range(2):
        for m, one in ((net, ordinary), (other, optimizer)):
            one.step(closure_of(m, one))
        assert all(p.grad is None for p in other.parameters())
        compare_and_align(optimizer, ordinary, torch.float32, f"step {number}")


def test_groups_with_their_own_values(backend: str) -> None:
    def make(params: Any) -> Any:
        first, *rest = params
        groups = [{"params": [first], "lr": 0.1, "rho": 0.3}, {"params": rest, "gamma": 0.5}]
        return WSAM(groups, AdamW, lr=0.01, backend=backend)

    pairs = pair(lambda: Separate(backend), make)
    results = []
    for net, optimizer in pairs:
        optimizer.step(closure_of(net, optimizer))
        results.append(values_of(net.parameters()))
    assert all(map(torch.equal, *results))


def test_call_by_call(backend: str) -> None:
    results = []
    for net, optimizer in pair(
        lambda: Separate(backend), lambda p: SAM(p, AdamW, lr=0.01, backend=backend)
    ):
        for last in (optimizer.second_step, optimizer.step):
            net.losses().mean().backward()
            optimizer.first_step(zero_grad=True)
            perturbed = values_of(net.parameters())
            net.losses().mean().backward()
            assert optimizer.is_perturbed
            now = [torch.equal(p, q) for p, q in zip(perturbed, net.parameters(), strict=True)]
            assert any(now) is (optimizer._in_backward is None)
            with pytest.raises(RuntimeError, match=r"state_dict\(\) was called while"):
                optimizer.state_dict()
            last()
            assert not optimizer.is_perturbed
            optimizer.zero_grad()
        counts = {entry["step"].item() for entry in optimizer.state.values()}
        assert counts == {2.0}
        results.append(values_of(net.parameters()))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("inside", [False, True], ids=["forward", "whole step"])
def test_autocast_and_checkpointing(inside: bool) -> None:
    """A segment is computed again within the backward, when others have been updated."""
    results = []
    for net, optimizer in pair(lambda: chain()[0], lambda p: WSAM(p, AdamW, lr=0.01)):
        _, x, y = chain()

        def closure(net: Any = net, optimizer: Any = optimizer, x: Any = x, y: Any = y) -> Tensor:
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                hidden = checkpoint(net[:4], x, use_reentrant=False)
                loss = (net[4:](hidden).float() - y).square().mean()
            loss.backward()
            return loss

        for _ in range(3):
            with torch.autocast("cpu", torch.bfloat16, enabled=inside):
                optimizer.step(closure)
        results.append(values_of(net.parameters()))
    torch.testing.assert_close(*results)


# ---- parameters that are not as the others ---------------------------------------------------


def test_without_a_second_gradient_a_parameter_is_restored(backend: str) -> None:
    net, x, y = chain()
    optimizer = SAM(net.parameters(), AdamW, lr=0.01, restore="backup", backend=backend)
    optimizer.update_in_backward()
    before = values_of(net.parameters())
    chain_loss(net, x, y).backward()
    optimizer.first_step(zero_grad=True)
    net[0].weight.requires_grad_(False)
    chain_loss(net, x, y).backward()
    optimizer.second_step()
    same = list(map(torch.equal, before, net.parameters()))
    assert same == [True, False, False]
    net[0].weight.requires_grad_(True)
    optimizer.step(closure_of(_Losses(net, x, y), optimizer))
    assert not torch.equal(before[0], net[0].weight)


class _Losses:
    def __init__(self, net: nn.Module, x: Tensor, y: Tensor) -> None:
        self.losses = lambda: chain_loss(net, x, y).reshape(1)


def test_without_a_first_gradient_a_parameter_is_left_alone(backend: str) -> None:
    net, x, y = chain()
    optimizer = WSAM(net.parameters(), AdamW, lr=0.01, backend=backend)
    optimizer.update_in_backward()
    before = values_of(net.parameters())
    net[2].weight.requires_grad_(False)
    net[2].weight.grad = torch.zeros_like(net[2].weight)  # it belongs to the lists
    chain_loss(net, x, y).backward()
    net[2].weight.grad = None
    optimizer.first_step(zero_grad=True)
    net[2].weight.requires_grad_(True)
    chain_loss(net, x, y).backward()
    optimizer.second_step()
    same = list(map(torch.equal, before, net.parameters()))
    assert same == [False, True, False]
    assert not optimizer.is_perturbed


def test_parameters_that_join_later(backend: str) -> None:
    """By being thawed, and in a new group."""
    results = []
    for in_backward in (False, True):
        net, x, y = chain()
        first, second, third = net.parameters()
        second.requires_grad_(False)
        optimizer = WSAM([first, second], AdamW, lr=0.01, backend=backend)
        if in_backward:
            optimizer.update_in_backward()
        closure = closure_of(_Losses(net, x, y), optimizer)
        optimizer.step(closure)
        second.requires_grad_(True)
        optimizer.step(closure)
        third.grad = None
        optimizer.add_param_group({"params": [third], "lr": 0.1})
        optimizer.step(closure)
        if in_backward:
            assert all(param.grad is None for param in net.parameters())
        results.append(values_of(net.parameters()))
    torch.testing.assert_close(*results)


def test_a_step_that_is_skipped_counts_once(backend: str) -> None:
    net = Separate(backend)
    optimizer = SAM(net.parameters(), AdamW, lr=0.01, backend=backend)
    optimizer.update_in_backward()
    optimizer.step(closure_of(net, optimizer))
    before = values_of(net.parameters())

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = net.losses().mean() + net.weights[1].sum() * float("inf")
        loss.backward()
        return loss

    optimizer.step(closure)
    assert optimizer.skipped_steps.item() == 1
    assert all(map(torch.equal, before, net.parameters()))
    assert {entry["step"].item() for entry in optimizer.state.values()} == {1.0}
    optimizer.step(closure_of(net, optimizer))
    assert not any(map(torch.equal, before, net.parameters()))


def test_hyper_parameters_are_those_at_the_first_update() -> None:
    net, x, y = chain()
    optimizer = SAM(net.parameters(), torch.optim.SGD, lr=0.0, restore="backup")
    optimizer.update_in_backward()
    before = values_of(net.parameters())
    chain_loss(net, x, y).backward()
    optimizer.first_step(zero_grad=True)
    net[0].weight.requires_grad_(False)
    chain_loss(net, x, y).backward()
    net[0].weight.grad = torch.ones_like(net[0].weight)
    optimizer.param_groups[0]["lr"] = 1.0
    optimizer.second_step()
    assert all(map(torch.equal, before, net.parameters()))


def test_buckets() -> None:
    floats = torch.float32
    key = ListKey(torch.device("cpu"), floats, "cpu", 1, 0, False, floats, False)  # type: ignore[arg-type]
    other = key._replace(dtype=torch.float64)
    sizes = [100, 5, 20, 1, 26, 24, 2, 40, 0, 0]
    members = {key: [(torch.empty(n), 0, n) for n in sizes], other: [(torch.empty(1), 0, 1)]}
    found = {k: [n for _, _, n in list_] for k, list_ in in_buckets(members).items()}
    keys = [key._replace(bucket=b) for b in range(1, 7)]
    expected = [[100], [5, 20], [1, 24], [26], [2, 0, 0], [40]]
    assert {k: found[k] for k in keys} == dict(zip(keys, expected, strict=True))
    assert list(found.values())[-1] == [1]
    assert in_buckets({}) == {}


@pytest.mark.parametrize("method", METHODS_OF_ALL, ids=lambda method: method.__name__)
def test_the_docs_say_which_methods_can(method: Any) -> None:
    text = readme.METHODS.read_text()
    row = next(line for line in text.splitlines() if line.startswith(f"| `{method.__name__}"))
    optimizer = method(Net().parameters(), AdamW, lr=0.01)
    if row.endswith("| yes |"):
        assert optimizer.update_in_backward().active
    else:
        assert "| cannot: needs all of g" in row
        with pytest.raises(TypeError):
            optimizer.update_in_backward()
