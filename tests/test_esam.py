"""ESAM: which tensors it perturbs, and which samples it takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import parameters
from per_sample_cases import Linear, Net, vector
from torch import Tensor

from wsam_fused import ESAM


def test_esam_by_hand(backend: str) -> None:
    # Losses 3 a + 4 b, 0, -a: mean slope (2/3, 4/3), norm sqrt(20)/3; e = (1, 2) / sqrt(5) at
    # rho 0.5, beta 0.5. Rises 11/sqrt(5), 0, -1/sqrt(5): round(0.5 * 3) = 2 samples, the first two.
    a, b = vector(1.0), vector(2.0)
    at_call = []

    def losses_fn(index: Tensor | None = None) -> Tensor:
        at_call.append((a.item(), b.item(), index))
        losses = torch.cat([3 * a + 4 * b, 0 * a, -a])
        return losses if index is None else losses[index]

    optimizer = ESAM([a, b], torch.optim.SGD, rho=0.5, beta=0.5, lr=0.1, backend=backend)
    optimizer.step(losses_fn)
    assert at_call[1][:2] == pytest.approx((1 + 5**-0.5, 2 + 2 * 5**-0.5))
    assert at_call[2][2].tolist() == [0, 1]
    assert at_call[2][2].dtype == torch.int64
    assert (a.item(), b.item()) == pytest.approx((1 - 0.1 * 1.5, 2 - 0.1 * 2.0))


@pytest.mark.parametrize(
    ("gamma", "count"), [(0.01, 1), (0.25, 2), (0.5, 3), (0.58, 3), (0.59, 4), (0.95, None)]
)
def test_esam_selects_the_samples_that_rise_most(gamma: float, count: int | None) -> None:
    params = parameters("unaligned", torch.float64)
    losses = Linear(params)
    optimizer = ESAM(params, torch.optim.SGD, beta=1.0, gamma=gamma, lr=0.1)
    slopes = [slope.flatten(1) for slope in losses.slopes]
    rises = torch.cat(slopes, 1) @ torch.cat([slope.mean(0) for slope in slopes])
    optimizer.step(losses)
    if count is None:  # all of them: there is nothing to look for
        assert losses.calls == [None, None]
    else:
        assert losses.calls[:2] == [None, None]
        expected = rises.argsort(descending=True)[:count].sort().values
        assert losses.calls[2].tolist() == expected.tolist()  # type: ignore[union-attr]


def perturbed_tensors(optimizer: Any, losses: Linear) -> list[bool]:
    """Make a step and say which tensors were somewhere else at the second evaluation."""
    before = [param.detach().clone() for param in losses.params]
    moved: list[bool] = []

    def losses_fn(index: Tensor | None = None) -> Tensor:
        pairs = zip(losses.params, before, strict=True)
        moved[:] = [not torch.equal(param, w) for param, w in pairs]
        return losses(index)

    optimizer.step(losses_fn)
    return moved


def test_esam_perturbs_all_tensors_first_and_then_a_share() -> None:
    params = [vector(1.0) for _ in range(40)]
    optimizer = ESAM(params, torch.optim.SGD, beta=0.3, lr=0.0)
    found = [perturbed_tensors(optimizer, Linear(params)) for _ in range(50)]
    assert all(found[0])
    active = sum(map(sum, found[1:]))
    # 49 * 40 draws: 588 expected, standard deviation 20.
    assert 588 - 100 < active < 588 + 100
    assert found[1] != found[2]
    assert all(param.requires_grad for param in params)


def test_esam_always_perturbs_something() -> None:
    params = [vector(1.0) for _ in range(2)]
    optimizer = ESAM(params, torch.optim.SGD, beta=0.01, lr=0.0)
    found = [sum(perturbed_tensors(optimizer, Linear(params))) for _ in range(20)]
    assert found[0] == 2
    assert all(count == 1 for count in found[1:])


def test_esam_groups_have_their_own_share() -> None:
    groups = [
        {"params": [vector(1.0) for _ in range(10)], "beta": 1.0},
        {"params": [vector(1.0) for _ in range(10)], "beta": 1e-9},
    ]
    params = [param for group in groups for param in group["params"]]  # type: ignore[attr-defined]
    optimizer = ESAM(groups, torch.optim.SGD, lr=0.0)
    perturbed_tensors(optimizer, Linear(params))
    assert perturbed_tensors(optimizer, Linear(params)) == [True] * 10 + [False] * 10


def test_esam_makes_no_weight_gradients_for_inactive_tensors() -> None:
    params = [vector(1.0) for _ in range(20)]
    optimizer = ESAM(params, torch.optim.SGD, beta=0.5, lr=0.1)
    optimizer.step(Linear(params))
    required: list[list[bool]] = []

    def losses_fn(index: Tensor | None = None) -> Tensor:
        required.append([param.requires_grad for param in params])
        return Linear(params)(index)

    before = [param.item() for param in params]
    optimizer.step(losses_fn)
    assert 0 < sum(required[0]) < 20
    assert all(required[1])
    assert all(required[2])
    assert all(param.item() != w for param, w in zip(params, before, strict=True))


def test_esam_takes_all_tensors_where_the_active_ones_have_no_part_in_the_loss() -> None:
    used, unused = vector(1.0), vector(1.0)
    optimizer = ESAM([used, unused], torch.optim.SGD, beta=0.01, lr=0.1)
    losses = Linear([used])
    for _ in range(20):
        before = used.item()
        optimizer.step(losses)
        assert used.item() != before
    assert unused.item() == 1.0
    assert len(losses.calls) > 60  # it happened


def test_esam_refuses_losses_without_graph() -> None:
    params = [vector(1.0), vector(2.0)]
    optimizer = ESAM(params, torch.optim.SGD, lr=0.1)
    losses = Linear(params)
    optimizer.step(losses)
    before = [param.item() for param in params]
    with pytest.raises(ValueError, match="a tensor without graph"):
        optimizer.step(lambda index=None: losses(index).detach())
    assert [param.item() for param in params] == before
    assert all(param.requires_grad for param in params)


def test_esam_leaves_frozen_parameters_frozen() -> None:
    frozen, free = vector(1.0), vector(1.0)
    frozen.requires_grad_(False)
    optimizer = ESAM([frozen, free], torch.optim.SGD, beta=0.5, lr=0.1)
    for _ in range(3):
        optimizer.step(Linear([frozen, free]))
    assert not frozen.requires_grad
    assert frozen.item() == 1.0


def test_esam_compares_losses_of_the_same_dropout_masks() -> None:
    net = Net(dropout=0.5)
    optimizer = ESAM(net.model.parameters(), torch.optim.SGD, rho=1e-9, lr=0.1)
    optimizer.step(net)
    # Of 6 samples with other masks the mean loss would change by more than 1e-9 or so.
    assert abs(optimizer.last.sharpness) < 1e-6
