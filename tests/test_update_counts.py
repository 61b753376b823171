"""How often each parameter has been updated, where its state does not say it."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import SGD

from wsam_fused import SAM


def step(optimizer: Any, count: int) -> list[torch.Tensor]:
    """Step the first parameters with gradients of 1."""
    found = [param for group in optimizer.param_groups for param in group["params"]]
    for call in (optimizer.first_step, optimizer.second_step):
        for param in found[:count]:
            param.grad = torch.ones_like(param)
        call(zero_grad=True)
    return found


def damped(count: int, backend: str) -> Any:
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(count)]
    return SAM(params, SGD, lr=0.1, momentum=0.9, dampening=0.5, backend=backend)


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))],
    ids=["deepcopy", "pickle"],
)
def test_a_copy_of_a_copy_knows_which_momentum_has_not_begun(
    copied: Callable[[Any], Any], backend: str
) -> None:
    """The first step of a parameter is not dampened, whenever it gets its first gradient."""
    optimizer = damped(2, backend)
    step(optimizer, 1)
    twice = copied(copied(optimizer))
    expected = step(optimizer, 2)
    assert torch.equal(expected[1], torch.full((3,), 0.9))
    for param, wanted in zip(step(twice, 2), expected, strict=True):
        assert torch.equal(param, wanted)


def test_a_wrong_value_does_not_begin_the_momentum_of_a_new_parameter(backend: str) -> None:
    optimizer = damped(1, backend)
    step(optimizer, 1)
    group = {"params": [torch.nn.Parameter(torch.ones(3))]}
    optimizer.add_param_group(group)
    group["lr"] = -1.0
    with pytest.raises(ValueError, match=r"lr is -1.0"):
        step(optimizer, 2)
    assert group["params"][0] not in optimizer.state
    group["lr"] = 0.1
    assert torch.equal(step(optimizer, 2)[1], torch.full((3,), 0.9))
