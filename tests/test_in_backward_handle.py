"""The handle of the update in the backward: who keeps it, who has it, and what is left of it."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from in_backward_cases import Net, Separate, closure_of, values_of
from torch import nn
from torch.optim import AdamW

from wsam_fused import WSAM


@contextmanager
def no_collection() -> Iterator[None]:
    """Nothing that lies in a cycle is freed meanwhile."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def hooks_of(net: nn.Module) -> int:
    return sum(len(p._post_accumulate_grad_hooks or ()) for p in net.parameters())


def test_the_handle() -> None:
    net = Net()
    optimizer = WSAM(net.parameters(), AdamW, lr=0.01)
    optimizer.step(closure_of(net, optimizer))
    handle = optimizer.update_in_backward()
    assert handle.active
    with pytest.raises(RuntimeError, match="is active already"):
        optimizer.update_in_backward()
    optimizer.step(closure_of(net, optimizer))
    assert hooks_of(net) > 0
    handle.remove()
    handle.remove()
    assert not handle.active
    assert hooks_of(net) == 0
    with optimizer.update_in_backward() as another:
        optimizer.step(closure_of(net, optimizer))
        assert another.active
        handle.remove()  # not its own
        assert another.active
    assert not another.active
    optimizer.step(closure_of(net, optimizer))
    assert len(optimizer._engine.lists.lists) == 1
    counts = {optimizer.state[p]["step"].item() for p in net.parameters() if p is not net.unused}
    assert counts == {4.0}


def test_removal_within_a_step(backend: str) -> None:
    results = []
    for remove in (False, True):
        net = Separate(backend)
        optimizer = WSAM(net.parameters(), AdamW, lr=0.01, backend=backend)
        handle = optimizer.update_in_backward()
        net.losses().mean().backward()
        optimizer.first_step(zero_grad=True)
        if remove:
            net.weights[3].register_hook(lambda grad, handle=handle: handle.remove())
        net.losses().mean().backward()
        assert any(p.grad is not None for p in net.parameters()) is remove
        optimizer.second_step(zero_grad=True)
        results.append(values_of(net.parameters()))
    assert all(map(torch.equal, *results))


def test_nobody_keeps_the_optimizer_alive() -> None:
    net = Net()
    optimizer = WSAM(net.parameters(), AdamW, lr=0.01)
    handle = optimizer.update_in_backward()
    optimizer.step(closure_of(net, optimizer))
    reference = weakref.ref(optimizer)
    with no_collection():
        del optimizer
        assert reference() is None
    assert hooks_of(net) == 0
    assert not handle.active
    handle.remove()
    net.losses().mean().backward()


def test_the_optimizer_keeps_the_handle() -> None:
    net = Net()
    optimizer = WSAM(net.parameters(), AdamW, lr=0.01)
    with no_collection():
        optimizer.update_in_backward()
        optimizer.step(closure_of(net, optimizer))
    assert all(param.grad is None for param in net.parameters())


def test_copies_do_not_have_the_handle() -> None:
    net = Net()
    optimizer = WSAM(net.parameters(), AdamW, lr=0.01)
    optimizer.update_in_backward()
    optimizer.step(closure_of(net, optimizer))
    file = io.BytesIO()
    torch.save(optimizer, file)
    file.seek(0)
    _, deep = copy.deepcopy((net, optimizer))
    for other in (deep, torch.load(file, weights_only=False)):
        assert other._in_backward is None
        params = other.param_groups[0]["params"]
        for _ in range(2):
            for param in params:
                param.grad = torch.ones_like(param)
            (other.second_step if other.is_perturbed else other.first_step)(zero_grad=False)
        assert len(other._engine.lists.lists) == 1
        assert all(param.grad is not None for param in params)
    assert optimizer._in_backward is not None
    optimizer.step(closure_of(net, optimizer))


def test_checkpoints_are_those_of_the_ordinary_step(backend: str) -> None:
    net = Net()
    optimizer = WSAM(net.parameters(), AdamW, lr=0.01, backend=backend)
    handle = optimizer.update_in_backward()
    optimizer.step(closure_of(net, optimizer))
    saved = copy.deepcopy((net.state_dict(), optimizer.state_dict()))
    results = []
    for active in (True, False):
        net.load_state_dict(saved[0])
        optimizer.load_state_dict(copy.deepcopy(saved[1]))
        if not active:
            handle.remove()
        optimizer.step(closure_of(net, optimizer))
        assert (net.inner.weight.grad is None) is active
        results.append(values_of(net.parameters()))
    torch.testing.assert_close(*results)
