"""Sharpness, eigenvalues and gradient noise against closed forms."""

from __future__ import annotations

import builtins
from typing import Any

import pytest
import torch
from landscape_problems import DTYPES, Quadratic, batch, loss_of
from tolerances import LANDSCAPE, close
from torch import Tensor, nn

from wsam_fused import SAM
from wsam_fused.landscape import (
    gradient_noise_trace,
    hessian_eigenpairs,
    hessian_max_eigenvalue,
    sharpness,
)

# What the optimizers add to a norm; 1e-13 of the rise is more than rounding.
EPS = 1e-12
SPECTRUM = torch.cat([torch.tensor([9.0, 6.0, 3.0]), torch.linspace(-2.0, 1.0, 37)])


def assert_near(found: float, expected: Any, dtype: torch.dtype, what: str) -> None:
    value = torch.as_tensor(expected, dtype=torch.float64)
    close(torch.tensor(found, dtype=torch.float64), value, LANDSCAPE[dtype], what)


def small_net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()


# ---- sharpness -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_sharpness_of_a_quadratic(dtype: torch.dtype, backend: str) -> None:
    model, rho = Quadratic(SPECTRUM / 10, dtype), 0.3
    _, g, hessian = model.exact()
    unit = g / (g.norm() + EPS)
    expected = rho * (g @ unit) + rho**2 * (unit @ hessian @ unit) / 2
    found = sharpness(model, model.loss, rho, backend=backend)
    assert_near(found, expected, dtype, "sharpness")


@pytest.mark.parametrize("only_weights", [False, True])
@pytest.mark.parametrize(("geometry", "eta"), [("adaptive", 0.1), ("fisher", 2.0)])
def test_sharpness_in_other_geometries(geometry: str, eta: float, only_weights: bool) -> None:
    model, rho = Quadratic(SPECTRUM / 10, torch.float64), 0.2
    w, g, _ = model.exact()
    metric = (w.abs() + eta) ** 2 if geometry == "adaptive" else 1 / (1 + eta * g * g)
    if only_weights:
        metric[4:] = 1.0
    e = rho * metric * g / ((metric * g * g).sum().sqrt() + EPS)
    found = sharpness(model, model.loss, rho, geometry=geometry, eta=eta, only_weights=only_weights)
    assert_near(found, model.at(w + e) - model.at(w), torch.float64, geometry)
    plain = sharpness(model, model.loss, rho)
    assert abs(found - plain) > 1e-3, "the geometry has no effect"


def test_sharpness_is_the_rise_that_a_step_of_sam_finds() -> None:
    torch.manual_seed(1)
    model, (x, y) = small_net(), batch()
    loss = loss_of(model, x.double(), y.double())
    found = sharpness(model, loss, 0.5)
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.5, lr=0.1)

    def closure() -> Tensor:
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)
    assert_near(found, optimizer.last.sharpness, torch.float64, "opt.last.sharpness")


def test_sharpness_without_radius_or_slope_is_zero() -> None:
    model = Quadratic(SPECTRUM, torch.float64)
    assert sharpness(model, model.loss, 0.0) == 0.0
    flat = nn.Linear(3, 1)
    assert sharpness(flat, lambda: (0.0 * flat.weight).sum(), 0.5) == 0.0


@pytest.mark.parametrize("batches", [1, 2])
def test_gradients_in_the_same_memory_are_told_apart(batches: int) -> None:
    """Autograd gives both terms of a sum one tensor, and the third parameter another."""
    model, factors = nn.Module(), torch.tensor([1.0, 2.0, 2.0]).double()
    for name in "abc":
        setattr(model, name, nn.Parameter(torch.zeros(3, dtype=torch.float64)))

    def loss() -> Tensor:
        return ((model.a + model.b) * factors).sum() + (model.c * factors).sum()

    grads = torch.autograd.grad(loss(), [model.a, model.b])
    assert grads[0].data_ptr() == grads[1].data_ptr()
    found = sharpness(model, [loss] * batches, 0.6)
    assert_near(found, 0.6 * 27 / (27**0.5 + EPS), torch.float64, "norm of all")


# ---- eigenvalues ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 3, 25])
def test_eigenpairs_of_a_quadratic(dtype: torch.dtype, count: int) -> None:
    pytest.importorskip("scipy", reason="Lanczos is scipy's")
    model = Quadratic(SPECTRUM, dtype)
    # The unused parameter has 5 eigenvalues of 0.
    whole = torch.cat([SPECTRUM.double(), torch.zeros(5)]).sort(descending=True).values
    tol = 1e-5
    found = hessian_eigenpairs(model, model.loss, count, tol=tol)
    assert found.eigenvalues.dtype == torch.float64
    # Relative to the largest one also where an eigenvalue is near 0.
    torch.testing.assert_close(found.eigenvalues, whole[:count], rtol=tol, atol=9 * tol)
    shapes = [p.shape for p in model.parameters() if p.requires_grad]
    for value, vector in zip(found.eigenvalues, found.eigenvectors, strict=True):
        assert [part.shape for part in vector] == shapes
        assert {part.dtype for part in vector} == {dtype}
        v = torch.cat([part.flatten() for part in vector]).double()
        assert v.norm().item() == pytest.approx(1.0, abs=1e-5)
        product = torch.cat([model.hessian.double() @ v[:40], torch.zeros(5)])
        # The residual is what tol bounds, and the rounding of products.
        assert (product - value * v).norm() < 9 * 10 * tol


def test_the_largest_eigenvalue_is_not_the_largest_in_size() -> None:
    pytest.importorskip("scipy", reason="Lanczos is scipy's")
    model = Quadratic(-SPECTRUM, torch.float64)
    found = hessian_max_eigenvalue(model, model.loss, tol=1e-8)
    assert isinstance(found, float)
    assert found == pytest.approx(2.0, rel=1e-7)


@pytest.mark.parametrize("count", [1, 12])
def test_eigenpairs_of_a_tiny_model(count: int) -> None:
    eigenvalues = torch.tensor([5.0, 2.0, 1.0, -1.0, -2.0, -2.5, -3.0])
    model = Quadratic(eigenvalues, torch.float64)
    found = hessian_eigenpairs(model, model.loss, count)
    whole = torch.cat([eigenvalues[:3], torch.zeros(5), eigenvalues[3:]]).double()
    for number in range(count):
        assert_near(found.eigenvalues[number].item(), whole[number], torch.float64, str(number))
    assert len(found.eigenvectors) == count


def test_eigenvalues_of_a_loss_without_curvature() -> None:
    pytest.importorskip("scipy", reason="Lanczos is scipy's")
    model = nn.Linear(30, 1)
    found = hessian_eigenpairs(model, lambda: model(torch.ones(30)).sum(), 2)
    assert found.eigenvalues.tolist() == [0.0, 0.0]
    gram = [
        [sum((a * b).sum() for a, b in zip(v, u, strict=True)) for v in found[1]] for u in found[1]
    ]
    assert torch.equal(torch.tensor(gram), torch.eye(2))


def test_a_seed_gives_the_same_eigenpairs() -> None:
    """Also where Lanczos runs out of directions and needs another random vector."""
    pytest.importorskip("scipy", minversion="1.17", reason="older ones draw without a seed")
    model = nn.Linear(40, 1, bias=False).double()
    mask = torch.zeros(40, dtype=torch.float64)
    mask[0] = 1.0

    def loss() -> Tensor:
        return -(model.weight[0] * mask).sum().square()

    one, two = (hessian_eigenpairs(model, loss, 3, seed=4) for _ in range(2))
    assert torch.equal(one.eigenvalues, two.eigenvalues)
    for first, second in zip(one.eigenvectors, two.eigenvectors, strict=True):
        assert all(map(torch.equal, first, second))


def test_attention_can_be_differentiated_twice() -> None:
    pytest.importorskip("scipy", reason="Lanczos is scipy's")
    torch.manual_seed(4)
    model, x = nn.Linear(4, 8, bias=False).double(), torch.randn(3, 5, 4, dtype=torch.float64)

    def heads(weight: Tensor) -> Tensor:
        return (x @ weight.T).unflatten(-1, (2, 4)).transpose(1, 2)

    def loss() -> Tensor:
        h = heads(model.weight)
        return nn.functional.scaled_dot_product_attention(h, h, h).square().sum()

    def written_out(weight: Tensor) -> Tensor:
        h = heads(weight)
        return (torch.softmax(h @ h.mT / 2, -1) @ h).square().sum()

    found = hessian_max_eigenvalue(model, loss, tol=1e-8)
    whole = torch.autograd.functional.hessian(written_out, model.weight.detach()).view(32, 32)
    assert found == pytest.approx(torch.linalg.eigvalsh(whole)[-1].item(), rel=1e-7)


def test_no_convergence_says_how_far_it_got() -> None:
    pytest.importorskip("scipy", reason="Lanczos is scipy's")
    model = Quadratic(torch.linspace(0.999, 1.0, 200), torch.float64)
    with pytest.raises(RuntimeError) as caught:
        hessian_eigenpairs(model, model.loss, 4, tol=1e-14, max_iterations=1)
    message = str(caught.value)
    for part in ("of 4 eigenvalues", "max_iterations=1", "products", "tol=1e-14"):
        assert part in message


def test_without_scipy_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == "scipy":
            raise ImportError(f"No module named {name!r}")
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    model = Quadratic(SPECTRUM, torch.float64)
    with pytest.raises(ImportError, match="pip install scipy"):
        hessian_max_eigenvalue(model, model.loss)


# ---- noise ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_noise_of_linear_regression(dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    model, x, y = nn.Linear(3, 1).to(dtype), torch.randn(20, 3), torch.randn(20, 1)
    x, y = x.to(dtype), y.to(dtype)
    found = gradient_noise_trace(
        model, [loss_of(model, x[i : i + 1], y[i : i + 1]) for i in range(20)]
    )
    with torch.no_grad():
        inputs = torch.cat([x, torch.ones(20, 1, dtype=dtype)], 1).double()
        weight = torch.cat([model.weight[0], model.bias]).double()
        grads = 2 * (inputs @ weight - y[:, 0].double())[:, None] * inputs
        expected = grads.square().sum(1).mean() - grads.mean(0).square().sum()
    assert_near(found, expected, dtype, "trace")


def test_noise_of_a_network_is_that_of_torch_func() -> None:
    model, (x, y) = small_net(), batch()
    x, y = x.double(), y.double()
    params = {name: param.detach() for name, param in model.named_parameters()}

    def one(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.mse_loss(torch.func.functional_call(model, params, (x,)), y)

    each = torch.func.vmap(torch.func.grad(one), in_dims=(None, 0, 0))(params, x, y)
    grads = torch.cat([grad.flatten(1) for grad in each.values()], 1)
    expected = grads.var(0, unbiased=False).sum()
    found = gradient_noise_trace(model, [loss_of(model, *pair) for pair in zip(x, y, strict=True)])
    assert_near(found, expected, torch.float64, "trace")


def test_samples_that_are_alike_have_no_noise() -> None:
    """In float64 too, a difference of squares would leave rounding of either sign."""
    model, (x, y) = small_net(), batch()
    loss = loss_of(model, x.double(), y.double())
    assert gradient_noise_trace(model, [loss] * 7) == 0.0


def test_a_sample_that_does_not_reach_a_parameter_counts_as_zero() -> None:
    model = nn.Module()
    model.a, model.b = (nn.Parameter(torch.ones(1, dtype=torch.float64)) for _ in range(2))
    found = gradient_noise_trace(model, [lambda: 2 * model.a.sum(), lambda: 4 * model.b.sum()])
    assert found == 1.0 + 4.0


# ---- batches -------------------------------------------------------------------------------------


def test_batches_are_the_whole() -> None:
    pytest.importorskip("scipy", reason="Lanczos is scipy's")
    model, (x, y) = small_net(), batch()
    x, y = x.double(), y.double()
    whole = loss_of(model, x, y)
    parts = [loss_of(model, *pair) for pair in zip(x.chunk(4), y.chunk(4), strict=True)]
    assert_near(sharpness(model, parts, 0.3), sharpness(model, whole, 0.3), x.dtype, "sharpness")
    one, other = (hessian_eigenpairs(model, loss, 2, tol=1e-10) for loss in (whole, parts))
    torch.testing.assert_close(one.eigenvalues, other.eigenvalues, rtol=1e-9, atol=0)


def test_dropout_has_the_same_masks_in_every_evaluation() -> None:
    """Without, the rise would be that from one mask to another."""
    model = nn.Sequential(nn.Linear(4, 50), nn.Dropout(), nn.Linear(50, 2)).double()
    x, y = batch()
    loss = loss_of(model, x.double(), y.double())
    assert sharpness(model, loss, 0.0) == 0.0
    assert loss().item() != loss().item()
