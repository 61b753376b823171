"""What looks at the landscape leaves everything as it was."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from landscape_problems import (
    LOOKS,
    Awkward,
    Loss,
    assert_left,
    batch,
    everything,
    give_gradients,
    loss_of,
)
from torch import Tensor, nn

from wsam_fused import SAM
from wsam_fused.landscape import (
    hessian_max_eigenvalue,
    loss_slice_1d,
    sharpness,
)


def awkward(**options: Any) -> tuple[Awkward, list[Loss]]:
    torch.manual_seed(6)
    model = Awkward(**options).double()
    give_gradients(model)
    x, y = batch()
    x, y = x.double(), y.double()
    pairs = zip(x.chunk(2), y.chunk(2), strict=True)
    return model, [loss_of(model, *pair) for pair in pairs]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("look", LOOKS)
def test_everything_is_left(look: str, training: bool) -> None:
    pytest.importorskip("scipy", reason="Lanczos is scipy's")
    model, losses = awkward()
    model.train(training)
    before = everything(model)
    first = LOOKS[look](model, losses)
    assert_left(model, before)
    again = LOOKS[look](model, losses)
    if isinstance(first, float):
        assert first == again
    assert model.evaluated > 0


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("fails", [1, 2, 3, 4])
@pytest.mark.parametrize("look", LOOKS)
def test_everything_is_left_after_a_failure(
    look: str, fails: int, error: type[BaseException]
) -> None:
    pytest.importorskip("scipy", reason="Lanczos is scipy's")
    # The graph of a single loss is kept: it is evaluated once.
    fails = 1 if look == "hessian" else fails
    model, losses = awkward(fails=fails, error=error)
    before = everything(model)
    with pytest.raises(error, match="failed"):
        LOOKS[look](model, losses)
    assert model.evaluated == fails
    assert_left(model, before)


class FailsBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise KeyboardInterrupt("failed")


def failing(loss: Loss) -> Loss:
    return lambda: FailsBackward.apply(loss())


@pytest.mark.parametrize("look", ["sharpness", "hessian", "hessian-batches", "noise"])
def test_everything_is_left_after_a_failed_backward(look: str) -> None:
    model, losses = awkward()
    before = everything(model)
    with pytest.raises(KeyboardInterrupt, match="failed"):
        LOOKS[look](model, [failing(loss) for loss in losses])
    assert_left(model, before)


def test_a_failed_product_leaves_everything() -> None:
    pytest.importorskip("scipy", reason="Lanczos is scipy's")

    class FailsTwice(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return FailsBackward.apply(grad)

    model, losses = awkward()
    before = everything(model)
    with pytest.raises(KeyboardInterrupt, match="failed"):
        hessian_max_eigenvalue(model, lambda: FailsTwice.apply(losses[0]()).square())
    assert_left(model, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_are_left_bit_by_bit(dtype: torch.dtype) -> None:
    """A restore by computation would be off by a rounding somewhere."""
    torch.manual_seed(0)
    model = nn.Linear(200, 200).to(dtype)
    x = torch.randn(8, 200, dtype=dtype)
    before = everything(model)
    sharpness(model, lambda: model(x).float().square().mean(), 3.0)
    loss_slice_1d(model, lambda: model(x).float().square().mean(), points=4)
    assert_left(model, before)


def test_hooks_of_backward_do_not_run() -> None:
    """They may step an optimizer."""
    model, losses = awkward()
    called = []
    for param in model.parameters():
        if param.requires_grad:
            param.register_post_accumulate_grad_hook(called.append)
    LOOKS["sharpness"](model, losses)
    LOOKS["noise"](model, losses)
    assert not called


def test_other_leaves_get_no_gradient() -> None:
    model, x = nn.Linear(4, 2), torch.ones(3, 4, requires_grad=True)
    sharpness(model, lambda: model(x).square().mean(), 0.1)
    hessian_max_eigenvalue(model, lambda: model(x).square().mean())
    assert x.grad is None


@pytest.mark.parametrize("look", LOOKS)
def test_within_no_grad(look: str) -> None:
    pytest.importorskip("scipy", reason="Lanczos is scipy's")
    model, losses = awkward()
    with torch.no_grad():
        found = LOOKS[look](model, losses)
        assert not torch.is_grad_enabled()
    if isinstance(found, float):
        assert found == LOOKS[look](model, losses)


def test_between_steps_of_an_optimizer() -> None:
    """Looking at the landscape changes nothing of a training run."""

    def trained(*, looks: bool) -> Tensor:
        torch.manual_seed(3)
        model, (x, y) = nn.Linear(4, 2), batch()
        loss = loss_of(model, x, y)
        optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)

        def closure() -> Tensor:
            optimizer.zero_grad()
            value = loss()
            value.backward()
            return value

        for _ in range(3):
            optimizer.step(closure)
            if looks:
                sharpness(model, loss, 0.3)
                hessian_max_eigenvalue(model, loss)
        return model.weight.detach()

    assert torch.equal(trained(looks=True), trained(looks=False))


def test_within_autocast() -> None:
    """Autocast remembers 16-bit copies of weights, which are outdated when these move."""
    torch.manual_seed(0)
    model, (x, y) = nn.Linear(4, 2), batch()
    with torch.autocast("cpu", torch.bfloat16):
        line = loss_slice_1d(model, loss_of(model, x, y), points=3)
        found = sharpness(model, loss_of(model, x, y), 0.5)
        at_end = loss_of(model, x, y)()
    assert len(set(line.losses.tolist())) == 3
    assert found > 0.0
    assert at_end.item() == line.losses[1].item()


def test_importing_brings_neither_scipy_nor_matplotlib() -> None:
    code = (
        "import sys, wsam_fused, wsam_fused.landscape\n"
        "print(sorted({'scipy', 'matplotlib'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"
