"""Sharpness of sharded and replicated models, against one process; what else refuses them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from processes import run_ranks
from sharded_cases import Net, own_share, problem
from tolerances import REPLICAS, close
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel

from wsam_fused.landscape import (
    direction_to,
    gradient_noise_trace,
    hessian_max_eigenvalue,
    loss_slice_1d,
    random_direction,
    sharpness,
)

RANKS = 2
GEOMETRIES = ["euclidean", "adaptive"]


def sharded(rank: int) -> dict[str, Any]:
    model, x, y = problem()
    own_x, own_y = own_share(x, RANKS, rank), own_share(y, RANKS, rank)
    fully_shard(model.first)
    fully_shard(model)
    given = [torch.full_like(param, 0.5) for param in model.parameters()]
    for param, grad in zip(model.parameters(), given, strict=True):
        param.grad = grad
    before = [param.full_tensor().clone() for param in model.parameters()]

    def loss() -> torch.Tensor:
        return mse_loss(model(own_x), own_y)

    found: dict[str, Any] = {g: sharpness(model, loss, 0.3, geometry=g) for g in GEOMETRIES}
    found["weights"] = all(
        torch.equal(param.full_tensor(), old)
        for param, old in zip(model.parameters(), before, strict=True)
    )
    found["grads"] = all(p.grad is g for p, g in zip(model.parameters(), given, strict=True))
    found["refusals"] = refusals(model, loss)
    found["one rank is poisoned"] = refusal_of(
        lambda: sharpness(model, lambda: loss() * (float("nan") if rank else 1.0), 0.3)
    )
    found["afterwards"] = sharpness(model, loss, 0.3)
    return found


def refusal_of(call: Any) -> str:
    try:
        call()
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def refusals(model: nn.Module, loss: Any) -> list[str]:
    calls = [
        lambda: hessian_max_eigenvalue(model, loss),
        lambda: gradient_noise_trace(model, [loss, loss]),
        lambda: loss_slice_1d(model, loss),
        lambda: random_direction(model),
        lambda: direction_to(model, Net()),
    ]
    return [refusal_of(call) for call in calls]


def replicated(rank: int) -> dict[str, Any]:
    """Each rank looks at its own loss, and the model can be trained afterwards."""
    model, x, y = problem()
    own_x, own_y = own_share(x, RANKS, rank), own_share(y, RANKS, rank)
    parallel = DistributedDataParallel(model)

    def loss() -> torch.Tensor:
        return mse_loss(parallel(own_x), own_y)

    found = {"sharpness": sharpness(parallel, loss, 0.3), "alone": own_sharpness(rank)}
    loss().backward()
    found["gradient"] = model.last.weight.grad
    return found


def own_sharpness(rank: int) -> float:
    model, x, y = problem()
    own_x, own_y = own_share(x, RANKS, rank), own_share(y, RANKS, rank)
    return sharpness(model, lambda: mse_loss(model(own_x), own_y), 0.3)


def both(rank: int) -> dict[str, Any]:
    return {"sharded": sharded(rank), "replicated": replicated(rank)}


@pytest.fixture(scope="module")
def ranks() -> list[Any]:
    return run_ranks(both, RANKS)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_sharpness_of_a_sharded_model(ranks: list[Any], geometry: str) -> None:
    """Perturbed by the gradient over all ranks, the mean of their rises is that of the batch."""
    model, x, y = problem()
    alone = sharpness(model, lambda: mse_loss(model(x), y), 0.3, geometry=geometry)
    mean = sum(found["sharded"][geometry] for found in ranks) / RANKS
    close(torch.tensor(mean).double(), torch.tensor(alone).double(), REPLICAS, geometry)
    assert ranks[0]["sharded"][geometry] != ranks[1]["sharded"][geometry]


def test_a_sharded_model_is_left(ranks: list[Any]) -> None:
    for found in ranks:
        assert found["sharded"]["weights"]
        assert found["sharded"]["grads"]
        assert found["sharded"]["afterwards"] == found["sharded"]["euclidean"]


def test_all_ranks_refuse_what_is_not_finite_on_one(ranks: list[Any]) -> None:
    for found in ranks:
        message = found["sharded"]["one rank is poisoned"]
        assert message.startswith("ValueError: the gradient of the loss is not finite")


def test_what_takes_no_sharded_parameters_says_so(ranks: list[Any]) -> None:
    for found in ranks:
        assert len(found["sharded"]["refusals"]) == 5
        for message in found["sharded"]["refusals"]:
            assert message.startswith("TypeError: model has a DTensor: 'first.weight'")


def test_sharpness_of_replicas_is_that_of_each(ranks: list[Any]) -> None:
    for found in ranks:
        assert found["replicated"]["sharpness"] == found["replicated"]["alone"]
    gradients = [found["replicated"]["gradient"] for found in ranks]
    assert torch.equal(*gradients)
