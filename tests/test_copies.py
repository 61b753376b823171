"""Copies of copies: what is not in the state is carried on."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import SGD

from wsam_fused import SAM


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))],
    ids=["deepcopy", "pickle"],
)
def test_a_copy_of_a_copy_knows_which_momentum_has_not_begun(
    copied: Callable[[Any], Any], backend: str
) -> None:
    """The first step of a parameter is not dampened, whenever it gets its first gradient."""
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizer = SAM(params, SGD, lr=0.1, momentum=0.9, dampening=0.5, backend=backend)

    def step(optimizer: Any, count: int) -> list[torch.Tensor]:
        found: list[torch.Tensor] = optimizer.param_groups[0]["params"]
        for call in (optimizer.first_step, optimizer.second_step):
            for param in found[:count]:
                param.grad = torch.ones_like(param)
            call(zero_grad=True)
        return found

    step(optimizer, 1)
    twice = copied(copied(optimizer))
    expected = step(optimizer, 2)
    assert torch.equal(expected[1], torch.full((3,), 0.9))
    for param, wanted in zip(step(twice, 2), expected, strict=True):
        assert torch.equal(param, wanted)
