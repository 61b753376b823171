"""Steps computed by hand from the papers' equations, with numbers that come out even.

One parameter vector w = (3, 4), g1 = (3, 4) with norm 5, rho = 5, so that e = g1 and p = (6, 8);
g2 = (1, 2), and g3 = (4, 2) where there is one.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from wsam_fused import BSAM, GNP, GSAM, SAM, WSAM


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
        if optimizer.evaluations == 3:
            assert (w - start).tolist() == pytest.approx([-1.5, -2.0], rel=1e-11)
            w.grad = torch.tensor([4.0, 2.0], dtype=torch.float64)
            optimizer.third_step(zero_grad=True)
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


def test_gsam_with_sgd(backend: str) -> None:
    # g1 . g2 = 11 and |g2|^2 = 5: cos |g1| / |g2| = 2.2. alpha = 0.5:
    # h = -0.5 (3, 4) + (1 + 1.1) (1, 2) = (0.6, 2.2)
    found = one_step(
        lambda p: GSAM(p, torch.optim.SGD, rho=5.0, alpha=0.5, lr=0.1, backend=backend)
    )
    assert found == pytest.approx([2.94, 3.78])


def test_gsam_with_clipping(backend: str) -> None:
    # Of the clipped gradients (0.6, 0.8) and (1, 2) / sqrt(5), both of norm 1, cos is 2.2 / sqrt(5)
    found = one_step(
        lambda p: GSAM(
            p, torch.optim.SGD, rho=5.0, alpha=0.5, lr=1.0, max_grad_norm=1.0, backend=backend
        )
    )
    weight = 1 + 0.5 * 2.2 / 5**0.5
    expected = [3 + 0.3 - weight / 5**0.5, 4 + 0.4 - weight * 2 / 5**0.5]
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("as_published", "start"), [(False, (3.0, 4.0)), (True, (1.5, 2.0))])
def test_bsam_with_sgd(as_published: bool, start: tuple[float, float], backend: str) -> None:
    # |g2| / |g3| = 1/2: h = (3, 4) + (1, 2) - (2, 1) = (2, 5), from w or from w - e_min
    found = one_step(
        lambda p: BSAM(
            p,
            torch.optim.SGD,
            rho=5.0,
            rho_min=2.5,
            as_published=as_published,
            lr=0.1,
            backend=backend,
        )
    )
    assert found == pytest.approx([start[0] - 0.2, start[1] - 0.5])


def test_gnp_with_sgd(backend: str) -> None:
    # h = 0.25 (3, 4) + 0.75 (1, 2) = (1.5, 2.5)
    found = one_step(
        lambda p: GNP(p, torch.optim.SGD, rho=5.0, alpha=0.75, lr=0.1, backend=backend)
    )
    assert found == pytest.approx([2.85, 3.75])


@pytest.mark.parametrize(
    ("options", "gradient", "rho", "expected"),
    [
        # |w| g = (4, 6), norm sqrt(52); e = rho w^2 g / norm
        ({"adaptive": True}, (4.0, 3.0), 52**0.5, (5.0, 14.0)),
        # |w| + 1 = (2, 3): (8, 6), norm 10; e = 0.5 (4, 9) (4, 2)
        ({"geometry": "adaptive", "eta": 1.0}, (4.0, 2.0), 5.0, (9.0, 11.0)),
        # M = 1 / (1 + g^2) = (0.5, 0.1): sum of M g^2 = 1.4
        ({"geometry": "fisher", "eta": 1.0}, (1.0, 3.0), 1.4**0.5, (1.5, 2.3)),
    ],
)
def test_geometries(
    options: dict[str, Any],
    gradient: tuple[float, float],
    rho: float,
    expected: tuple[float, float],
    backend: str,
) -> None:
    w = torch.nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))
    optimizer = SAM([w], torch.optim.SGD, rho=rho, lr=0.1, backend=backend, **options)
    w.grad = torch.tensor(gradient, dtype=torch.float64)
    optimizer.first_step(zero_grad=True)
    assert w.tolist() == pytest.approx(expected, rel=1e-11)


def test_clipping_scales_each_gradient_by_its_own_norm(backend: str) -> None:
    # max norm 1: g1 / 5 and g2 / sqrt(5); the perturbation uses the whole g1 (asserted inside).
    # gamma = 0.5: w - 0.1 g1' - 0.1 (g2' - g1') = w - 0.1 g2'
    found = one_step(
        lambda p: WSAM(
            p, torch.optim.SGD, rho=5.0, gamma=0.5, lr=0.1, max_grad_norm=1.0, backend=backend
        )
    )
    assert found == pytest.approx([3 - 0.1 / 5**0.5, 4 - 0.2 / 5**0.5], rel=1e-6)
