"""What may be said about the geometry, and what follows from it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import METHODS, parameters, set_gradients, step
from tolerances import ONE_STEP, close
from torch.optim import SGD

from wsam_fused import BSAM, GSAM, SAM, WSAM


def model() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4)).double()


@pytest.mark.parametrize(
    ("arguments", "geometry", "eta"),
    [
        ({}, "euclidean", 0.0),
        ({"adaptive": True}, "adaptive", 0.0),
        ({"adaptive": False}, "euclidean", 0.0),
        ({"adaptive": True, "eta": 0.5}, "adaptive", 0.5),
        ({"adaptive": True, "geometry": "adaptive"}, "adaptive", 0.01),
        ({"geometry": "adaptive"}, "adaptive", 0.01),
        ({"geometry": "fisher"}, "fisher", 1.0),
        ({"geometry": "fisher", "eta": 0.0}, "fisher", 0.0),
    ],
)
def test_defaults(arguments: dict[str, Any], geometry: str, eta: float) -> None:
    for method in (SAM, WSAM, GSAM, BSAM):
        group = method(model().parameters(), SGD, lr=0.1, **arguments).param_groups[0]
        assert (group["geometry"], group["eta"]) == (geometry, eta)


def test_groups_have_geometries_of_their_own(backend: str) -> None:
    params = parameters("unaligned", torch.float64)
    groups = [
        {"params": params[:1]},
        {"params": params[1:2], "adaptive": True},
        {"params": params[2:3], "geometry": "fisher"},
        {"params": params[3:], "adaptive": False},
    ]
    optimizer = SAM(groups, SGD, lr=0.1, eps=0.0, geometry="adaptive", eta=0.3, backend=backend)
    found = [(group["geometry"], group["eta"]) for group in optimizer.param_groups]
    assert found == [("adaptive", 0.3), ("adaptive", 0.0), ("fisher", 1.0), ("euclidean", 0.0)]
    weights = [param.detach().clone() for param in params]
    set_gradients(params, 0)
    grads = [param.grad.clone() for param in params]  # type: ignore[union-attr]
    optimizer.first_step(zero_grad=True)
    metric = [
        (weights[0].abs() + 0.3) ** 2,
        weights[1] ** 2,
        1 / (1 + grads[2] ** 2),
        torch.ones_like(weights[3]),
    ]
    squares = sum((m * g * g).sum() for m, g in zip(metric, grads, strict=True))
    for param, w, m, g in zip(params, weights, metric, grads, strict=True):
        expected = w + 0.05 / squares.sqrt() * m * g  # type: ignore[union-attr]
        close(param.detach(), expected, ONE_STEP[torch.float64], "perturbed")


def test_only_weights_are_scaled_where_asked_for(backend: str) -> None:
    net = model()
    optimizer = SAM(
        net.named_parameters(),
        SGD,
        lr=0.1,
        rho=0.5,
        geometry="adaptive",
        only_weights=True,
        eps=0.0,
        backend=backend,
    )
    named = dict(net.named_parameters())
    before = {name: param.detach().clone() for name, param in named.items()}
    set_gradients(list(named.values()), 0)
    grads = {name: param.grad.clone() for name, param in named.items()}  # type: ignore[union-attr]
    optimizer.first_step(zero_grad=True)
    metric = {
        name: (w.abs() + 0.01) ** 2 if name.endswith("weight") else torch.ones_like(w)
        for name, w in before.items()
    }
    squares = sum((metric[name] * grads[name] ** 2).sum() for name in named)
    assert {name for name in named if name.endswith("weight")} == {"0.weight", "1.weight"}
    for name, param in named.items():
        expected = before[name] + 0.5 / squares.sqrt() * metric[name] * grads[name]  # type: ignore[union-attr]
        close(param.detach(), expected, ONE_STEP[torch.float64], name)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"geometry": "round"}, ValueError, "geometry is 'round', expected one of 'euclidean'"),
        ({"adaptive": True, "geometry": "fisher"}, ValueError, "adaptive is True, short for"),
        ({"eta": -0.1}, ValueError, "eta is -0.1, expected a number >= 0"),
        ({"eta": float("nan")}, ValueError, "eta is nan, expected a number >= 0"),
        ({"only_weights": True}, ValueError, "needs the parameters' names"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    for method in (SAM, WSAM, GSAM, BSAM):
        with pytest.raises(error, match=message):
            method(model().parameters(), SGD, lr=0.1, **arguments)


def test_bad_values_in_groups() -> None:
    net = model()
    with pytest.raises(ValueError, match="geometry is 'round'"):
        SAM([{"params": net.parameters(), "geometry": "round"}], SGD, lr=0.1)
    optimizer = SAM(net.parameters(), SGD, lr=0.1)
    params = list(net.parameters())
    before = [param.detach().clone() for param in params]
    optimizer.param_groups[0]["geometry"] = "round"
    set_gradients(params, 0)
    with pytest.raises(ValueError, match="geometry is 'round'"):
        optimizer.first_step(zero_grad=True)
    assert all(torch.equal(param, w) for param, w in zip(params, before, strict=True))


@pytest.mark.parametrize("method", ["sam", "wsam", "gsam", "bsam"])
def test_fisher_with_eta_0_is_euclidean(method: str, backend: str) -> None:
    results = []
    for options in ({}, {"geometry": "fisher", "eta": 0.0}):
        torch.manual_seed(1)
        params = parameters("unaligned", torch.float64)
        optimizer = METHODS[method](params, SGD, lr=0.1, backend=backend, **options)
        for number in range(2):
            step(optimizer, params, number)
        results.append([param.detach() for param in params])
    for one, other in zip(*results, strict=True):
        close(one, other, ONE_STEP[torch.float64], method)


def test_the_geometry_may_change_while_training(backend: str) -> None:
    params = parameters("unaligned", torch.float64)
    optimizer = SAM(params, SGD, lr=0.1, eps=0.0, backend=backend)
    step(optimizer, params, 0)
    optimizer.param_groups[0].update(geometry="fisher", eta=0.5)
    before = [param.detach().clone() for param in params]
    set_gradients(params, 2)
    grads = [param.grad.clone() for param in params]  # type: ignore[union-attr]
    optimizer.first_step(zero_grad=True)
    metric = [1 / (1 + 0.5 * g * g) for g in grads]
    squares = sum((m * g * g).sum() for m, g in zip(metric, grads, strict=True))
    for param, w, m, g in zip(params, before, metric, grads, strict=True):
        expected = w + 0.05 / squares.sqrt() * m * g  # type: ignore[union-attr]
        close(param.detach(), expected, ONE_STEP[torch.float64], "perturbed")
