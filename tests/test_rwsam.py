"""RW-SAM: its noise and its weights."""

from __future__ import annotations

import pytest
import torch
from cases import BASES, parameters
from per_sample_cases import Linear, Net, vector
from torch import Tensor

from wsam_fused import RWSAM


def test_rwsam_by_hand(backend: str) -> None:
    # Losses 3 w and w at w = 2: |l' - l| / delta is 3 and 1 for either sign. lam = log(3) / 2:
    # weights 3/4 and 1/4. g1 > 0, so e = rho = 0.5, and g2 = 2 w for the square that is there too.
    w = vector(2.0)
    slopes = torch.tensor([3.0, 1.0], dtype=torch.float64)
    points, grads = [], []
    w.register_hook(grads.append)

    def losses_fn(index: Tensor | None = None) -> Tensor:
        points.append(w.item())
        return slopes * w

    optimizer = RWSAM(
        [w],
        torch.optim.SGD,
        rho=0.5,
        lam=torch.log(torch.tensor(3.0, dtype=torch.float64)).item() / 2,
        delta=0.25,
        lr=0.1,
        backend=backend,
    )
    loss = optimizer.step(losses_fn)
    assert points[0] in (1.75, 2.25)
    assert points[1:] == pytest.approx([2.0, 2.5])
    assert [grad.item() for grad in grads] == pytest.approx([0.75 * 3 + 0.25, 2.0])
    assert w.item() == pytest.approx(2.0 - 0.1 * 2.0)
    assert loss.item() == pytest.approx(4.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
def test_rwsam_probes_along_signs_and_returns_exactly(dtype: torch.dtype, backend: str) -> None:
    params = parameters("sizes", dtype)
    optimizer = RWSAM(params, BASES["sgd"], delta=2.0**-8, backend=backend)
    losses = Linear(params)
    signs = []
    for _ in range(2):
        before = [param.detach().clone() for param in params]
        points: list[list[Tensor]] = []

        def losses_fn(index: Tensor | None = None, points: list[list[Tensor]] = points) -> Tensor:
            points.append([param.detach().clone() for param in params])
            return losses(index)

        optimizer.step(losses_fn)
        assert all(torch.equal(p, w) for p, w in zip(points[1], before, strict=True))
        moves = [p.double() - w.double() for p, w in zip(points[0], before, strict=True)]
        flat = torch.cat([move.flatten() for move in moves])
        unit = torch.finfo(dtype).eps * 8
        assert ((flat.abs() - 2.0**-8).abs() <= unit).all()
        signs.append(flat > 0)
    shares = [sign.double().mean().item() for sign in signs]
    count = signs[0].numel()
    assert all(abs(share - 0.5) < 4 * 0.5 / count**0.5 for share in shares)
    assert 0.45 < (signs[0] == signs[1]).double().mean() < 0.55  # new signs in every step


def test_rwsam_weighs_by_norms_that_are_right_on_average() -> None:
    params = [torch.nn.Parameter(torch.randn(50, dtype=torch.float64)) for _ in range(4)]
    losses = Linear(params)
    optimizer = RWSAM(params, torch.optim.SGD, lr=0.0, seed=1)
    squares = []
    for _ in range(400):
        probed = optimizer._probe(losses)
        squares.append(((probed - losses().detach()) / 1e-3) ** 2)
        optimizer.param_groups[0]["sam_step"] += 1
    expected = sum(slope.flatten(1).square().sum(1) for slope in losses.slopes)
    found = torch.stack(squares).mean(0)
    # The square of a sum of signs has a standard deviation of sqrt(2) times its mean.
    torch.testing.assert_close(found, expected, rtol=4 * (2 / 400) ** 0.5, atol=0.0)


def test_rwsam_compares_losses_of_the_same_dropout_masks_and_draws_no_more() -> None:
    net = Net(dropout=0.5)
    optimizer = RWSAM(net.model.parameters(), torch.optim.SGD, delta=1e-7, lr=0.1)
    state = torch.get_rng_state()
    probed = optimizer._probe(net)
    assert torch.equal(torch.get_rng_state(), state)
    assert ((net().detach() - probed).abs() < 1e-4).all()


@pytest.mark.parametrize("lam", [1.0, 1e6])
def test_rwsam_with_large_exponents_is_finite(lam: float, backend: str) -> None:
    params = parameters("unaligned", torch.float32)
    optimizer = RWSAM(params, BASES["sgd"], lam=lam, backend=backend)
    optimizer.step(Linear(params))
    assert optimizer.skipped_steps == 0
    assert all(param.isfinite().all() for param in params)


def test_rwsam_with_an_infinite_loss_skips_the_step(backend: str) -> None:
    params = parameters("unaligned", torch.float32)
    optimizer = RWSAM(params, BASES["adamw"], restore="backup", backend=backend)
    losses = Linear(params)
    optimizer.step(losses)
    before = [param.detach().clone() for param in params]
    optimizer.step(lambda index=None: losses(index) + torch.tensor([0.0] * 5 + [float("inf")]))
    assert optimizer.skipped_steps == 1
    assert all(torch.equal(p, w) for p, w in zip(params, before, strict=True))


def test_rwsam_refuses_what_has_too_few_bits() -> None:
    low = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r"a parameter is torch\.bfloat16, too coarse"):
        RWSAM([low], torch.optim.SGD, lr=0.1)
    params = parameters("unaligned", torch.float32)
    losses = Linear(params)
    optimizer = RWSAM(params, torch.optim.SGD, lr=0.1)
    with pytest.raises(ValueError, match=r"returned torch\.bfloat16, too coarse"):
        optimizer.step(lambda index=None: losses(index).bfloat16())
    assert not optimizer.is_perturbed
