"""Gradients in memory that somebody else writes to, or that two parameters share."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD, RMSprop

from wsam_fused import SAM, WSAM

METHODS = pytest.mark.parametrize(
    "method",
    [
        functools.partial(WSAM, base_optimizer=SGD, lr=0.01),
        functools.partial(WSAM, base_optimizer=SGD, lr=0.01, restore="backup"),
        functools.partial(SAM, base_optimizer=SGD, lr=0.01),
        # The copy of w takes the memory of the first gradient.
        functools.partial(SAM, base_optimizer=SGD, lr=0.01, restore="backup"),
        functools.partial(SAM, base_optimizer=SGD, lr=0.01, adaptive=True),
        # The step of another optimizer is given h and d in the memory of both gradients.
        functools.partial(WSAM, base_optimizer=RMSprop, lr=0.01),
        functools.partial(SAM, base_optimizer=RMSprop, lr=0.01),
    ],
    ids=["wsam", "wsam-backup", "sam", "sam-backup", "asam", "wsam-foreign", "sam-foreign"],
)


class StaticGradient(torch.autograd.Function):
    """Like a graphed callable: its gradient is memory that the next backward overwrites."""

    memory: Tensor | None = None

    @staticmethod
    def forward(ctx: Any, param: Tensor) -> Tensor:
        ctx.save_for_backward(param)
        return (param.detach() ** 4).sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (param,) = ctx.saved_tensors
        value = 4 * param**3 * gradients[0]
        if StaticGradient.memory is None:
            return value
        return StaticGradient.memory.copy_(value).detach()


@METHODS
def test_memory_that_the_next_backward_overwrites(
    method: Any, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for memory in (None, torch.zeros(64)):
        monkeypatch.setattr(StaticGradient, "memory", memory)
        torch.manual_seed(0)
        param = torch.nn.Parameter(torch.randn(64))
        optimizer = method([param], rho=0.5, backend=backend)

        def closure(param: Any = param, optimizer: Any = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss: Tensor = StaticGradient.apply(param)
            loss.backward()
            return loss

        for _ in range(3):
            optimizer.step(closure)
        results.append(param.detach())
    assert torch.equal(*results)


@METHODS
def test_two_parameters_whose_gradients_share_memory(method: Any, backend: str) -> None:
    results = []
    for separate in (False, True):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(4, 3)) for _ in range(2)]
        optimizer = method(params, rho=0.5, backend=backend)

        def closure(
            params: Any = params, optimizer: Any = optimizer, separate: bool = separate
        ) -> Tensor:
            optimizer.zero_grad()
            total = params[0][None] + params[1][None]
            loss = ((total - 1) ** 2 * torch.arange(12.0).view(4, 3)).sum()
            loss.backward()
            shares = params[0].grad.data_ptr() == params[1].grad.data_ptr()
            assert shares or optimizer.is_perturbed, "nothing is shared, nothing is tested"
            if separate:
                for param in params:
                    param.grad = param.grad.clone()
            return loss

        for _ in range(2):
            optimizer.step(closure)
        results.append(torch.cat([param.detach().flatten() for param in params]))
    assert torch.equal(*results)


@pytest.mark.parametrize("base", [SGD, RMSprop])
def test_an_overwritten_first_gradient_is_an_error(base: Any, backend: str) -> None:
    """The same tensor twice: what nothing about it could have told."""
    param = torch.nn.Parameter(torch.ones(5))
    optimizer = WSAM([param], base, lr=0.1, restore="backup", backend=backend)
    grad = torch.arange(5.0)
    param.grad = grad
    optimizer.first_step(zero_grad=True)
    param.grad = grad.mul_(2)
    with pytest.raises(RuntimeError, match=r"was written over the first one.*zero_grad=False"):
        optimizer.second_step()
    assert not optimizer.is_perturbed
    assert torch.equal(param, torch.ones(5))
    param.grad = grad
    optimizer.first_step(zero_grad=False)
    param.grad = grad
    optimizer.second_step()


def test_private_memory_is_not_copied(backend: str) -> None:
    param = torch.nn.Parameter(torch.ones(5))
    optimizer = WSAM([param], SGD, lr=0.1, backend=backend)
    for _ in range(3):
        (param**2).sum().backward()
        grad = param.grad
        assert grad is not None
        optimizer.first_step(zero_grad=True)
        (taken,) = optimizer._engine.lists.lists[0].grads[0]  # type: ignore[union-attr]
        assert taken is grad
        (param**2).sum().backward()
        optimizer.second_step(zero_grad=True)
