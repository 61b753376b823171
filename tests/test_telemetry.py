"""What ``optimizer.last`` tells of a step: only what the step had anyway, and it is right."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import METHODS, call, parameters, set_gradients, step
from torch import Tensor
from torch.optim import SGD

from wsam_fused import WSAM


def flat(params: list[torch.nn.Parameter]) -> Tensor:
    return torch.cat([param.grad.flatten() for param in params])  # type: ignore[union-attr]


# Which norms each method forms, and whether it needs the product of the first two gradients.
KNOWN = {"sam": (1, False), "wsam": (1, False), "gsam": (2, True), "bsam": (3, False)}


@pytest.mark.parametrize("checked", [False, True])
@pytest.mark.parametrize("method", KNOWN)
def test_norms_and_cosine(method: str, checked: bool, backend: str) -> None:
    params = parameters("unaligned", torch.float64)
    optimizer = METHODS[method](
        params, SGD, lr=0.1, adaptive=True, check_finite=checked, backend=backend
    )
    assert optimizer.last.grad_norm is None
    gradients = []
    for evaluation in range(optimizer.evaluations):
        set_gradients(params, evaluation)
        gradients.append(flat(params))
        call(optimizer, evaluation)
    last = optimizer.last
    norms = [last.grad_norm, last.second_grad_norm, last.third_grad_norm]
    known, has_cosine = KNOWN[method]
    known = optimizer.evaluations if checked else known
    assert [norm is not None for norm in norms] == [k < known for k in range(3)]
    for norm, gradient in zip(norms[:known], gradients, strict=False):
        assert norm.dtype == torch.float64
        torch.testing.assert_close(norm, gradient.norm())
    assert (last.cosine is not None) == has_cosine
    if has_cosine:
        expected = torch.cosine_similarity(gradients[0], gradients[1], dim=0)
        torch.testing.assert_close(last.cosine, expected)


def test_a_step_that_forms_less_does_not_show_what_an_earlier_one_formed(backend: str) -> None:
    params = parameters("unaligned", torch.float64)
    optimizer = METHODS["gsam"](params, SGD, lr=0.1, every=2, backend=backend)

    def one_step() -> None:
        set_gradients(params, 0)
        optimizer.first_step(zero_grad=True)
        if optimizer.is_perturbed:
            set_gradients(params, 1)
            optimizer.second_step(zero_grad=True)

    one_step()
    one_step()
    assert optimizer.last.cosine is not None
    one_step()
    assert optimizer.last.cosine is None
    assert optimizer.last.second_grad_norm is None


def test_losses_of_a_closure(backend: str) -> None:
    w = torch.nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))
    optimizer = WSAM([w], SGD, rho=0.5, lr=0.1, backend=backend)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = 0.5 * w.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert optimizer.last.loss == pytest.approx(12.5)
    assert optimizer.last.perturbed_loss == pytest.approx(5.5**2 / 2)
    assert optimizer.last.sharpness == pytest.approx(5.5**2 / 2 - 12.5)
    assert not optimizer.last.loss.requires_grad


def test_losses_are_those_of_the_step_and_not_kept_from_an_earlier_one(backend: str) -> None:
    params = parameters("unaligned", torch.float64)
    optimizer = METHODS["bsam"](params, SGD, lr=0.1, backend=backend)
    losses = iter([1.0, 3.0, 7.0])

    def closure() -> Tensor:
        set_gradients(params, 0)
        return torch.tensor(next(losses))

    optimizer.step(closure)
    assert (optimizer.last.loss, optimizer.last.perturbed_loss) == (1.0, 3.0)
    step(optimizer, params, 1)
    assert optimizer.last.loss is None
    assert optimizer.last.sharpness is None


def test_reading_launches_nothing_before_it_is_asked(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scalars stay where they are until somebody wants a root of them."""
    params = parameters("unaligned", torch.float32)
    optimizer = METHODS["gsam"](params, SGD, lr=0.1, backend=backend)
    step(optimizer, params, 0)
    calls: list[Any] = []
    item = Tensor.item
    monkeypatch.setattr(Tensor, "item", lambda tensor: calls.append(tensor) or item(tensor))
    for name in ("grad_norm", "second_grad_norm", "cosine", "sharpness", "loss"):
        getattr(optimizer.last, name)
    assert not calls
