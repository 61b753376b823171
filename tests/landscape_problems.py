"""Models whose landscape is known, and what must be left as it was found."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from wsam_fused.landscape import (
    gradient_noise_trace,
    hessian_eigenpairs,
    hessian_max_eigenvalue,
    loss_slice_1d,
    loss_slice_2d,
    sharpness,
)

DTYPES = [torch.float32, torch.float64]
Loss = Callable[[], Tensor]
# All that can be asked of a landscape, called with a model and two losses.
LOOKS: dict[str, Callable[[nn.Module, list[Loss]], Any]] = {
    "sharpness": lambda model, losses: sharpness(model, losses, 0.5),
    "sharpness-adaptive": lambda model, losses: sharpness(model, losses, 0.5, geometry="adaptive"),
    "sharpness-eager": lambda model, losses: sharpness(model, losses, 0.5, backend="eager"),
    "hessian": lambda model, losses: hessian_eigenpairs(model, losses[0], 2, tol=0.1),
    "hessian-batches": lambda model, losses: hessian_max_eigenvalue(model, losses, tol=0.1),
    "noise": lambda model, losses: gradient_noise_trace(model, losses * 2),
    "line": lambda model, losses: loss_slice_1d(model, losses, points=3),
    "plane": lambda model, losses: loss_slice_2d(model, losses, points=2),
}


class Quadratic(nn.Module):
    """L(w) = 1 + b.w + w'Hw / 2, where H has chosen eigenvalues.

    w has two parts; a third parameter takes no part, and a fourth requires no gradient.

    Args:
        eigenvalues: Of H, shape [n], n > 4.
        dtype: Of everything.
    """

    def __init__(self, eigenvalues: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        n = len(eigenvalues)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        basis = torch.linalg.qr(normal(n, n)).Q
        hessian = (basis * eigenvalues.double()) @ basis.T
        self.weight = nn.Parameter(normal(2, 2).to(dtype))
        self.bias = nn.Parameter(normal(n - 4).to(dtype))
        self.unused = nn.Parameter(normal(5).to(dtype))
        self.frozen = nn.Parameter(normal(2).to(dtype), requires_grad=False)
        self.register_buffer("hessian", ((hessian + hessian.T) / 2).to(dtype))
        self.register_buffer("slope", normal(n).to(dtype))

    def vector(self) -> Tensor:
        return torch.cat([self.weight.flatten(), self.bias])

    def at(self, w: Tensor) -> Tensor:
        return 1 + self.slope.to(w.dtype) @ w + w @ (self.hessian.to(w.dtype) @ w) / 2

    def loss(self) -> Tensor:
        return self.at(self.vector())

    def exact(self) -> tuple[Tensor, Tensor, Tensor]:
        """w, gradient and Hessian in float64, of the numbers that are stored."""
        w, hessian = self.vector().detach().double(), self.hessian.double()
        return w, self.slope.double() + hessian @ w, hessian


class Awkward(nn.Module):
    """All that evaluations change: statistics, random numbers, a buffer that is exchanged, a mode.

    Args:
        fails: Number of the evaluation that fails, from 1; 0 for none.
        error: What it raises.
    """

    def __init__(self, fails: int = 0, error: type[BaseException] = RuntimeError) -> None:
        super().__init__()
        self.first = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 6))
        self.norm = nn.BatchNorm1d(6)
        self.dropout = nn.Dropout(0.3)
        self.last = nn.Linear(6, 2)
        self.last.bias.requires_grad_(False)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("expanded", torch.ones(1).expand(3))
        self.register_buffer("nothing", None)
        self.fails, self.error, self.evaluated = fails, error, 0

    def forward(self, x: Tensor) -> Tensor:
        self.evaluated += 1
        self.calls = self.calls + 1  # another tensor
        hidden = self.dropout(torch.tanh(self.norm(self.first(x))))
        self.norm.eval()
        if self.evaluated == self.fails:
            raise self.error("failed")
        return self.last(hidden)


def batch(rows: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(rows, 4, generator=generator), torch.randn(rows, 2, generator=generator)


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Loss:
    return lambda: mse_loss(model(x), y)


def give_gradients(model: nn.Module) -> None:
    """Leave gradients of an earlier backward in some of the parameters."""
    for number, param in enumerate(model.parameters()):
        if param.requires_grad and number != 1:
            param.grad = torch.full_like(param, 0.25)


def everything(model: nn.Module) -> dict[str, Any]:
    """All that has to stay: which objects they are, where they are, their bits."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    grads = {name: param.grad for name, param in model.named_parameters()}
    return {
        "objects": {name: (id(tensor), tensor.data_ptr()) for name, tensor in tensors.items()},
        "values": {name: tensor.detach().clone() for name, tensor in tensors.items()},
        "grads": grads,
        "grad values": {n: None if grad is None else grad.clone() for n, grad in grads.items()},
        "modes": [module.training for module in model.modules()],
        "requires": [param.requires_grad for param in model.parameters()],
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
    }


def assert_left(model: nn.Module, before: dict[str, Any]) -> None:
    """Assert that everything is as it was."""
    after = everything(model)
    for key in ("objects", "modes", "requires", "python"):
        assert after[key] == before[key], key
    assert torch.equal(after["torch"], before["torch"])
    assert after["values"].keys() == before["values"].keys()
    for name, value in after["values"].items():
        assert torch.equal(value, before["values"][name]), name
    for name, grad in after["grads"].items():
        assert grad is before["grads"][name], name
        if grad is not None:
            assert torch.equal(grad, before["grad values"][name]), name
