"""The largest eigenvalues of the Hessian of the loss, by Lanczos."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from wsam_fused.arguments import number, whole_number
from wsam_fused.landscape.as_found import SameStart, as_found
from wsam_fused.landscape.evaluation import (
    Loss,
    evaluate,
    gradients,
    loss_functions,
    number_of,
    require_finite_gradient,
    trainable,
)

# Takes and returns a vector of all parameters: float64, on the host, of shape [n].
Product = Callable[[Tensor], Tensor]


class HessianEigenpairs(NamedTuple):
    """Eigenvalues of a Hessian, largest first, and their eigenvectors.

    Attributes:
        eigenvalues: Shape [count], float64, on the CPU.
        eigenvectors: ``count`` lists, each with a tensor of the shape, dtype and device of every
            parameter that requires a gradient, in the order of ``model.parameters()``. Their norm
            over all of them is 1, their sign arbitrary. They serve as directions of a loss slice.
    """

    eigenvalues: Tensor
    eigenvectors: list[list[Tensor]]


def hessian_eigenpairs(
    model: nn.Module,
    loss: Loss | Sequence[Loss],
    count: int = 1,
    *,
    tol: float = 1e-3,
    max_iterations: int = 100,
    seed: int = 0,
) -> HessianEigenpairs:
    """Return the ``count`` largest eigenvalues of the Hessian of the loss, and eigenvectors.

    The implicitly restarted Lanczos method of ``scipy.sparse.linalg.eigsh``, on Hessian-vector
    products by double backward in the parameters' dtype; the vectors of Lanczos are float64 on the
    host, ``max(2 * count + 1, 20)`` of them. A model with no more parameters than that has its
    Hessian formed, without scipy. The graph of a single loss is kept from product to product; with
    a list of batches each product evaluates them again. Attention is computed by torch's plain
    kernel, the only one that can be differentiated twice; a model under ``torch.compile`` cannot.

    Args:
        model: In the mode in which it shall be evaluated; see :mod:`wsam_fused.landscape`.
        loss: The mean loss, or one for each batch of equal size.
        count: How many, from 1 to the number of parameters. The largest ones are meant as they are,
            not by their size: negative ones come last.
        tol: How precise eigenvalues have to be, relative to them, > 0; products in float32 allow
            about 1e-6.
        max_iterations: Restarts of Lanczos, >= 1, with at most ``max(2 * count + 1, 20)`` products
            each.
        seed: Of the vector that Lanczos starts with, >= 0.

    Raises:
        TypeError: ``model`` is no module or has DTensors, or ``loss`` is no function that returns a
            scalar tensor.
        ValueError: An argument is out of its range; the loss, its gradient or a product is not
            finite; or the loss does not depend on the parameters.
        RuntimeError: It did not converge, or an operation has no second derivative.
        ImportError: There is no scipy.
    """
    functions = loss_functions("loss", loss)
    params = list(trainable(model).values())
    size = sum(param.numel() for param in params)
    count = whole_number("count", count, 1)
    if count > size:
        raise ValueError(f"count is {count}, expected at most {size}, the number of parameters")
    tol = number("tol", tol, 0.0, low_included=False)
    max_iterations = whole_number("max_iterations", max_iterations, 1)
    seed = whole_number("seed", seed, 0)
    width = max(2 * count + 1, 20)
    with as_found(model) as start, torch.enable_grad(), _products(functions, params, start) as of:
        if size <= width:
            values, vectors = _dense(of, size, count)
        else:
            values, vectors = _lanczos(of, size, count, width, tol, max_iterations, seed)
    return HessianEigenpairs(values, [_as_parameters(v, params) for v in vectors.unbind(1)])


def hessian_max_eigenvalue(
    model: nn.Module,
    loss: Loss | Sequence[Loss],
    *,
    tol: float = 1e-3,
    max_iterations: int = 100,
    seed: int = 0,
) -> float:
    """Return the largest eigenvalue of the Hessian of the loss.

    It is what :func:`hessian_eigenpairs` finds, where the arguments and errors are, and what table
    9 of the WSAM paper (arXiv:2305.15817) calls lambda_max.
    """
    found = hessian_eigenpairs(model, loss, tol=tol, max_iterations=max_iterations, seed=seed)
    return float(found.eigenvalues[0])


# ---- products ------------------------------------------------------------------------------------


@contextmanager
def _products(
    functions: Sequence[Loss], params: Sequence[Tensor], start: SameStart
) -> Iterator[Product]:
    """Give the function that multiplies the Hessian of the mean loss by a vector."""
    if len(functions) == 1:
        with start.evaluation():
            grads = _gradient_graph(functions[0], params)
            yield lambda vector: _product(grads, params, vector, keep_graph=True)
        return

    def mean(vector: Tensor) -> Tensor:
        total = torch.zeros_like(vector)
        with start.evaluation():
            for function in functions:
                total += _product(_gradient_graph(function, params), params, vector)
        return total / len(functions)

    yield mean


def _gradient_graph(function: Loss, params: Sequence[Tensor]) -> list[Tensor | None]:
    with sdpa_kernel(SDPBackend.MATH):
        value = evaluate(function)
    grads = gradients(value, params, create_graph=True)
    require_finite_gradient(grads, number_of(value))
    return grads


def _product(
    grads: Sequence[Tensor | None],
    params: Sequence[Tensor],
    vector: Tensor,
    *,
    keep_graph: bool = False,
) -> Tensor:
    """Differentiate the gradient along a vector."""
    parts = _as_parameters(vector, params)
    # The others are constant: their derivative is zero.
    pairs = [(g, v) for g, v in zip(grads, parts, strict=True) if g is not None and g.requires_grad]
    if not pairs:
        return torch.zeros_like(vector)
    found = torch.autograd.grad(
        [grad for grad, _ in pairs],
        params,
        [part.to(grad.dtype) for grad, part in pairs],
        retain_graph=keep_graph,
        materialize_grads=True,
    )
    product = torch.cat([part.detach().reshape(-1).double().cpu() for part in found])
    if not bool(torch.isfinite(product).all()):
        raise ValueError("a product of the Hessian and a vector is not finite at these weights")
    return product


def _as_parameters(vector: Tensor, params: Sequence[Tensor]) -> list[Tensor]:
    parts = torch.split(vector, [param.numel() for param in params])
    return [part.to(p.device, p.dtype).view(p.shape) for part, p in zip(parts, params, strict=True)]


# ---- eigenvalues ---------------------------------------------------------------------------------


def _dense(product: Product, size: int, count: int) -> tuple[Tensor, Tensor]:
    """Return the largest eigenvalues, [count], and eigenvectors, [size, count]."""
    columns = [product(unit) for unit in torch.eye(size, dtype=torch.float64, device="cpu")]
    hessian = torch.stack(columns, 1)
    values, vectors = torch.linalg.eigh((hessian + hessian.T) / 2)
    return values.flip(0)[:count], vectors.flip(1)[:, :count].contiguous()


def _lanczos(
    product: Product,
    size: int,
    count: int,
    width: int,
    tol: float,
    max_iterations: int,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """Return the same as :func:`_dense`, by products only."""
    linalg = _scipy_linalg()
    generator = torch.Generator("cpu").manual_seed(seed)
    first = torch.randn(size, generator=generator, dtype=torch.float64, device="cpu")
    products, is_zero = 0, True

    def multiply(vector: Any) -> Any:
        nonlocal products, is_zero
        result = product(torch.tensor(vector, dtype=torch.float64, device="cpu").reshape(-1))
        products += 1
        is_zero = is_zero and not bool(result.any())
        return result.numpy()

    # Older versions draw from NumPy's own generator when they need another vector.
    rng = {"rng": seed} if "rng" in inspect.signature(linalg.eigsh).parameters else {}
    try:
        values, vectors = linalg.eigsh(
            linalg.LinearOperator((size, size), matvec=multiply, dtype="float64"),
            k=count,
            which="LA",
            v0=first.numpy(),
            ncv=width,
            maxiter=max_iterations,
            tol=tol,
            **rng,
        )
    except linalg.ArpackNoConvergence as error:
        found = sorted((float(value) for value in error.eigenvalues), reverse=True)
        raise RuntimeError(
            f"Lanczos found {len(found)} of {count} eigenvalues to tol={tol:g} within "
            f"max_iterations={max_iterations} ({products} products): {found}; allow more iterations"
            " or a larger tol"
        ) from error
    except linalg.ArpackError as error:
        if is_zero:  # it has no way to begin, and every vector is an eigenvector
            zeros = torch.zeros(count, dtype=torch.float64, device="cpu")
            return zeros, torch.eye(size, count, dtype=torch.float64, device="cpu")
        raise RuntimeError(f"Lanczos failed after {products} products: {error}") from error
    order = torch.from_numpy(values).argsort(descending=True)
    return torch.from_numpy(values)[order], torch.from_numpy(vectors)[:, order]


def _scipy_linalg() -> Any:
    try:
        import scipy.sparse.linalg
    except ImportError as error:
        raise ImportError(
            "eigenvalues of the Hessian need scipy: pip install scipy, or wsam_fused[landscape]"
        ) from error
    return scipy.sparse.linalg
