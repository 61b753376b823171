"""What cannot be looked at is refused, with a message that says why, and left as it was."""

from __future__ import annotations

import pytest
import torch
from landscape_problems import LOOKS, Quadratic, assert_left, everything
from torch import Tensor, nn

from wsam_fused.landscape import (
    direction_to,
    gradient_noise_trace,
    hessian_eigenpairs,
    hessian_max_eigenvalue,
    loss_slice_1d,
    loss_slice_2d,
    random_direction,
    sharpness,
)

MODEL = Quadratic(torch.linspace(0, 1, 30), torch.float32)
OTHER = nn.Linear(2, 2)
FROZEN = nn.Linear(2, 2).requires_grad_(False)
COMPLEX = nn.Linear(2, 2, dtype=torch.cfloat)


def good() -> Tensor:
    return MODEL.loss()


REFUSED = {
    "no module": (lambda: sharpness("net", good, 0.1), TypeError, "model is str"),
    "frozen": (lambda: hessian_max_eigenvalue(FROZEN, good), ValueError, "model has no parameter"),
    "complex": (
        lambda: gradient_noise_trace(COMPLEX, [good] * 2),
        TypeError,
        "complex parameter: 'weight'",
    ),
    "no function": (lambda: sharpness(MODEL, 3.0, 0.1), TypeError, "loss is 3.0"),
    "a tensor": (
        lambda: sharpness(MODEL, torch.zeros(()), 0.1),
        TypeError,
        r"loss is tensor\(0.\), expected functions",
    ),
    "not all functions": (
        lambda: hessian_max_eigenvalue(MODEL, [good, None]),
        TypeError,
        r"loss\[1\] is None",
    ),
    "no functions": (lambda: loss_slice_1d(MODEL, []), ValueError, "loss has 0 functions"),
    "one sample": (
        lambda: gradient_noise_trace(MODEL, [good]),
        ValueError,
        "losses has 1 functions, expected .* at least 2",
    ),
    "a number": (lambda: sharpness(MODEL, lambda: 1.0, 0.1), TypeError, "loss returned float"),
    "whole numbers": (
        lambda: sharpness(MODEL, lambda: torch.tensor(1), 0.1),
        TypeError,
        "loss returned torch.int64",
    ),
    "no mean": (
        lambda: sharpness(MODEL, MODEL.vector, 0.1),
        ValueError,
        r"loss returned shape \(30,\)",
    ),
    "no graph": (
        lambda: hessian_max_eigenvalue(MODEL, lambda: good().detach()),
        ValueError,
        "without a graph",
    ),
    "another model": (
        lambda: sharpness(OTHER, good, 0.1),
        ValueError,
        "loss does not depend on any parameter",
    ),
    "rho": (lambda: sharpness(MODEL, good, -1.0), ValueError, "rho is -1.0"),
    "rho that changes": (lambda: sharpness(MODEL, good, abs), TypeError, "rho is <built-in"),
    "geometry": (
        lambda: sharpness(MODEL, good, 0.1, geometry="round"),
        ValueError,
        "geometry is 'round'",
    ),
    "eta": (
        lambda: sharpness(MODEL, good, 0.1, geometry="fisher", eta=-1.0),
        ValueError,
        "eta is -1.0",
    ),
    "backend": (
        lambda: sharpness(MODEL, good, 0.1, backend="abacus"),
        ValueError,
        "backend is 'abacus'",
    ),
    "count": (lambda: hessian_eigenpairs(MODEL, good, 0), ValueError, "count is 0"),
    "too many": (
        lambda: hessian_eigenpairs(MODEL, good, 36),
        ValueError,
        "count is 36, expected at most 35",
    ),
    "tol": (lambda: hessian_max_eigenvalue(MODEL, good, tol=0.0), ValueError, "tol is 0.0"),
    "iterations": (
        lambda: hessian_max_eigenvalue(MODEL, good, max_iterations=0),
        ValueError,
        "max_iterations is 0",
    ),
    "seed": (lambda: hessian_max_eigenvalue(MODEL, good, seed=-1), ValueError, "seed is -1"),
    "seed of a direction": (lambda: random_direction(MODEL, -1), ValueError, "seed is -1"),
    "radius": (lambda: loss_slice_1d(MODEL, good, radius=0.0), ValueError, "radius is 0.0"),
    "points": (lambda: loss_slice_2d(MODEL, good, points=1), ValueError, "points is 1"),
    "no filters": (
        lambda: random_direction(nn.BatchNorm1d(3)),
        ValueError,
        "model has no parameter of two or more dimensions",
    ),
    "no direction": (
        lambda: loss_slice_1d(MODEL, good, 1.0),
        TypeError,
        "direction is float, expected a sequence of 3 tensors",
    ),
    "short direction": (
        lambda: loss_slice_1d(MODEL, good, random_direction(MODEL)[:2]),
        ValueError,
        "direction has 2 tensors, expected a sequence of 3",
    ),
    "wrong shape": (
        lambda: loss_slice_1d(MODEL, good, random_direction(MODEL)[::-1]),
        ValueError,
        r"direction\[0\] has shape \(5,\), expected \(2, 2\)",
    ),
    "infinite direction": (
        lambda: loss_slice_1d(MODEL, good, [part / 0 for part in random_direction(MODEL)]),
        ValueError,
        r"direction\[0\] has elements that are not finite",
    ),
    "one of two": (
        lambda: loss_slice_2d(MODEL, good, [random_direction(MODEL)]),
        ValueError,
        "directions has 1 elements, expected two",
    ),
    "no directions": (
        lambda: loss_slice_2d(MODEL, good, 3),
        TypeError,
        "directions is int, expected a sequence of two",
    ),
    "second direction": (
        lambda: loss_slice_2d(MODEL, good, [random_direction(MODEL), [torch.ones(1)]]),
        ValueError,
        r"directions\[1\] has 1 tensors",
    ),
    "way to nothing": (
        lambda: direction_to(MODEL, 1.0),
        TypeError,
        "other is float, expected a module or a state_dict",
    ),
    "way to less": (
        lambda: direction_to(MODEL, OTHER),
        ValueError,
        r"other has shape \(2,\) for 'bias', expected shape \(26,\)",
    ),
    "way to none": (lambda: direction_to(MODEL, {}), ValueError, "other has None for 'weight'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name: str) -> None:
    call, error, message = REFUSED[name]
    before = everything(MODEL)
    with pytest.raises(error, match=message):
        call()
    assert_left(MODEL, before)


class Root(nn.Module):
    """The sum of roots: at 0 it is finite and its gradient is not."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((5, 5), value))

    def loss(self) -> Tensor:
        return self.weight.sqrt().sum()


@pytest.mark.parametrize(("value", "message"), [(-1.0, "nan"), (0.0, "gradient .* not finite")])
@pytest.mark.parametrize("look", LOOKS)
def test_what_is_not_finite(look: str, value: float, message: str) -> None:
    model = Root(value)
    before = everything(model)
    if look in ("line", "plane"):
        LOOKS[look](model, [model.loss] * 2)
    else:
        with pytest.raises(ValueError, match=message):
            LOOKS[look](model, [model.loss] * 2)
    assert_left(model, before)


def test_a_neighbour_whose_loss_is_not_finite() -> None:
    model = Root(0.01)
    before = everything(model)
    with pytest.raises(ValueError, match=r"loss is nan at the worst-case neighbour \(rho=1\)"):
        sharpness(model, lambda: -model.loss(), 1.0)
    assert_left(model, before)


def test_a_curvature_that_is_not_finite() -> None:
    pytest.importorskip("scipy", reason="Lanczos is scipy's")
    model = Root(0.0)
    with pytest.raises(ValueError, match="a product of the Hessian and a vector is not finite"):
        hessian_max_eigenvalue(model, lambda: model.weight.abs().pow(1.5).sum())
