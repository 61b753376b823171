"""Steps computed by hand from the papers' equations, with numbers that come out even.

One parameter vector w = (3, 4), g1 = (3, 4) with norm 5, rho = 5, so that e = g1 and p = (6, 8);
g2 = (1, 2).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from wsam_fused import SAM, WSAM


def one_step(optimizer_of: Any, steps: int = 1) -> list[float]:
    w = torch.nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))
    optimizer = optimizer_of([w])
    for _ in range(steps):
        start = w.detach().clone()
        w.grad = torch.tensor([3.0, 4.0], dtype=torch.float64)
        optimizer.first_step(zero_grad=True)
        assert (w - start).tolist() == pytest.approx([3.0, 4.0], rel=1e-11)
        w.grad = torch.tensor([1.0, 2.0], dtype=torch.float64)
        optimizer.second_step(zero_grad=True)
    return w.tolist()


def test_sam_with_sgd(backend: str) -> None:
    # w - lr g2 = (3, 4) - 0.1 (1, 2)
    found = one_step(lambda p: SAM(p, torch.optim.SGD, rho=5.0, lr=0.1, backend=backend))
    assert found == pytest.approx([2.9, 3.8])


def test_decoupled_wsam_with_momentum_and_weight_decay(backend: str) -> None:
    # gamma = 0.75: weight 3, d = 3 (g2 - g1) = (-6, -6). u1 = g1 + 0.5 w = (4.5, 6), v1 = u1.
    # w1 = (3, 4) - 0.1 (4.5, 6) - 0.1 (-6, -6) = (3.15, 4.0)
    # u2 = (3, 4) + 0.5 w1 = (4.575, 6), v2 = 0.5 v1 + u2 = (6.825, 9)
    # w2 = (3.15, 4.0) - 0.1 (6.825, 9) + (0.6, 0.6) = (3.0675, 3.7)
    found = one_step(
        lambda p: WSAM(
            p,
            torch.optim.SGD,
            rho=5.0,
            gamma=0.75,
            lr=0.1,
            momentum=0.5,
            weight_decay=0.5,
            backend=backend,
        ),
        steps=2,
    )
    assert found == pytest.approx([3.0675, 3.7])


def test_coupled_wsam_with_sgd(backend: str) -> None:
    # gamma = 0.75: h = (1 - 3) g1 + 3 g2 = (-6 + 3, -8 + 6) = (-3, -2)
    found = one_step(
        lambda p: WSAM(
            p, torch.optim.SGD, rho=5.0, gamma=0.75, decouple=False, lr=0.1, backend=backend
        )
    )
    assert found == pytest.approx([3.3, 4.2])


def test_decoupled_wsam_with_adamw(backend: str) -> None:
    # The first Adam step is lr g1 / |g1| = (0.1, 0.1); decay (1 - 0.1 0.5) w = (2.85, 3.8);
    # d = (-6, -6): w = (2.85, 3.8) - (0.1, 0.1) + (0.6, 0.6)
    found = one_step(
        lambda p: WSAM(
            p, torch.optim.AdamW, rho=5.0, gamma=0.75, lr=0.1, weight_decay=0.5, backend=backend
        )
    )
    assert found == pytest.approx([3.35, 4.3], rel=1e-7)


def test_adaptive_perturbation(backend: str) -> None:
    # w = (1, 2), g1 = (4, 3): |w| g1 = (4, 6), norm sqrt(52); e = rho w^2 g1 / norm
    w = torch.nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))
    optimizer = SAM([w], torch.optim.SGD, rho=52**0.5, adaptive=True, lr=0.1, backend=backend)
    w.grad = torch.tensor([4.0, 3.0], dtype=torch.float64)
    optimizer.first_step(zero_grad=True)
    assert w.tolist() == pytest.approx([5.0, 14.0], rel=1e-11)


def test_clipping_scales_each_gradient_by_its_own_norm(backend: str) -> None:
    # max norm 1: g1 / 5 and g2 / sqrt(5); the perturbation uses the whole g1 (asserted inside).
    # gamma = 0.5: w - 0.1 g1' - 0.1 (g2' - g1') = w - 0.1 g2'
    found = one_step(
        lambda p: WSAM(
            p, torch.optim.SGD, rho=5.0, gamma=0.5, lr=0.1, max_grad_norm=1.0, backend=backend
        )
    )
    assert found == pytest.approx([3 - 0.1 / 5**0.5, 4 - 0.2 / 5**0.5], rel=1e-6)
