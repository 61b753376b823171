"""Loops with Accelerate equal those by hand, bit for bit unless it says otherwise."""

from __future__ import annotations

import os
from collections.abc import Iterator
from multiprocessing import get_all_start_methods
from pathlib import Path
from typing import Any

import pytest
import torch
from by_hand import assert_same, network, samples, train_by_hand, windows
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, TensorDataset

from wsam_fused import BSAM, RWSAM, SAM, WSAM

pytest.importorskip("accelerate", reason="Accelerate is not installed")

from accelerate import Accelerator, debug_launcher
from accelerate.optimizer import patch_optimizer_step
from accelerate.state import AcceleratorState, GradientState

from wsam_fused.integrations.accelerate import SharpnessAwareAccumulation

METHODS = {"sam": SAM, "wsam": WSAM, "bsam": BSAM}
EPOCHS = 2


@pytest.fixture(autouse=True)
def _forgets() -> Iterator[None]:
    """Accelerators of one process share a state."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def optimizer_of(method: str, trained: nn.Module, **options: Any) -> Any:
    arguments = {"rho": 0.3, "lr": 0.01, "weight_decay": 0.1, **options}
    return METHODS[method](trained.parameters(), torch.optim.AdamW, **arguments)


class Loop:
    """A script that uses Accelerate."""

    def __init__(
        self, method: str, size: int, parts: int, precision: str = "no", **options: Any
    ) -> None:
        self.model = network() if precision == "no" else network().float()
        self.accelerator = Accelerator(
            cpu=True, gradient_accumulation_steps=parts, mixed_precision=precision
        )
        optimizer = optimizer_of(method, self.model, **options)
        loader = DataLoader(TensorDataset(*samples()), batch_size=size)
        self.forward, self.optimizer, self.schedule, self.loader = self.accelerator.prepare(
            self.model, optimizer, StepLR(optimizer, 2, gamma=0.5), loader
        )
        self.accumulation = SharpnessAwareAccumulation(
            self.accelerator, self.optimizer, self.forward
        )
        self.evaluations = 0
        self.fails_at = -1

    def loss_of(self, x: Tensor, y: Tensor) -> Tensor:
        if self.evaluations == self.fails_at:
            raise RuntimeError("no memory")
        self.evaluations += 1
        return mse_loss(self.forward(x), y)

    def run(self, epochs: int = EPOCHS) -> Loop:
        for _ in range(epochs):
            for x, y in self.loader:
                with self.accelerator.accumulate(self.forward):
                    loss = self.accumulation.backward(self.loss_of, x, y)
                    assert not loss.requires_grad
                    self.optimizer.step()
                    self.schedule.step()
                    self.optimizer.zero_grad()
        return self


def expected_of(method: str, size: int, parts: int, period: int = 2, **options: Any) -> nn.Module:
    model = network()
    optimizer = optimizer_of(method, model, **options)
    schedule = StepLR(optimizer, period, gamma=0.5)
    steps = windows(size, parts) * EPOCHS
    loss_of = lambda x, y: mse_loss(model(x), y)  # noqa: E731
    train_by_hand(optimizer, steps, loss_of, parts=parts, after_step=schedule.step)
    return model


def test_a_closure_needs_nothing() -> None:
    accelerator = Accelerator(cpu=True)
    model = network()
    loader = DataLoader(TensorDataset(*samples()), batch_size=8)
    model, optimizer, loader = accelerator.prepare(model, optimizer_of("wsam", model), loader)
    for _ in range(EPOCHS):
        for x, y in loader:

            def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
                optimizer.zero_grad()
                loss = mse_loss(model(x), y)
                accelerator.backward(loss)
                return loss

            optimizer.step(closure)
    by_hand = network()
    expected = optimizer_of("wsam", by_hand)
    train_by_hand(expected, windows(8, 1) * EPOCHS, lambda x, y: mse_loss(by_hand(x), y))
    assert_same(model, by_hand)
    assert optimizer.optimizer.last.loss is not None


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("method", list(METHODS))
def test_accumulation_evaluates_all_micro_batches_again(method: str, parts: int) -> None:
    """Of the ten micro-batches of an epoch, the last is a step of its own."""
    loop = Loop(method, 4, parts).run()
    assert_same(loop.model, expected_of(method, 4, parts))
    assert loop.evaluations == 10 * EPOCHS * METHODS[method].evaluations


def test_accumulation_equals_one_large_batch() -> None:
    loop = Loop("wsam", 4, 2).run()
    large = expected_of("wsam", 8, 1)
    for found, wanted in zip(loop.model.parameters(), large.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-13)


def test_plain_steps_between_and_clipping() -> None:
    options = {"every": 2, "max_grad_norm": 0.2}
    loop = Loop("wsam", 4, 2, **options).run()
    assert_same(loop.model, expected_of("wsam", 4, 2, **options))
    assert loop.evaluations == 10 * EPOCHS + 10


def test_bfloat16_autocast() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    loop = Loop("wsam", 4, 2, precision="bf16")
    loop.loss_of = lambda x, y: mse_loss(loop.forward(x.float()), y.float())  # type: ignore[method-assign]
    loop.run()
    model = network().float()
    optimizer = optimizer_of("wsam", model)
    schedule = StepLR(optimizer, 2, gamma=0.5)

    def loss_of(x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            output = model(x.float())
        return mse_loss(output.float(), y.float())

    train_by_hand(optimizer, windows(4, 2) * EPOCHS, loss_of, after_step=schedule.step)
    assert_same(loop.model, model)


def test_a_saved_state_goes_on(tmp_path: Path) -> None:
    Loop("wsam", 4, 2).run(1).accelerator.save_state(str(tmp_path))
    resumed = Loop("wsam", 4, 2)
    resumed.accelerator.load_state(str(tmp_path))
    resumed.run(1)
    assert_same(resumed.model, expected_of("wsam", 4, 2))


def test_the_perturbed_loss_is_the_mean() -> None:
    loop = Loop("sam", 20, 2, rho=0.0)
    loop.run(1)
    x, y = samples()
    assert loop.optimizer.optimizer.last.loss is None
    found = loop.optimizer.optimizer.last.perturbed_loss
    torch.testing.assert_close(found, mse_loss(network()(x), y), rtol=1e-12, atol=0)


def test_an_exception_restores_the_weights() -> None:
    loop = Loop("wsam", 4, 2, restore="backup")
    loop.fails_at = 7  # in the second evaluation of the second step
    with pytest.raises(RuntimeError, match="no memory"):
        loop.run()
    model = network()
    optimizer = optimizer_of("wsam", model, restore="backup")
    train_by_hand(optimizer, windows(4, 2)[:1], lambda x, y: mse_loss(model(x), y))
    assert_same(loop.model, model)


def test_a_step_without_a_second_evaluation_is_an_error() -> None:
    optimizer = Accelerator(cpu=True).prepare(optimizer_of("sam", network()))
    with pytest.raises(RuntimeError, match=r"docs/use_with\.md"):
        optimizer.step()


def test_what_cannot_work_is_refused() -> None:
    accelerator, model = Accelerator(cpu=True), network()
    prepared = accelerator.prepare(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(TypeError, match="optimizer is AcceleratedOptimizer, expected an optimizer"):
        SharpnessAwareAccumulation(accelerator, prepared, model)
    prepared = accelerator.prepare(RWSAM(model.parameters(), torch.optim.SGD, lr=0.1))
    with pytest.raises(TypeError, match="is RWSAM, which needs the loss of every sample"):
        SharpnessAwareAccumulation(accelerator, prepared, model)


class ScalingLoop(Loop):
    """Losses are scaled as with mixed_precision="fp16", which needs a GPU; here in float64."""

    def __init__(self, method: str, parts: int, **options: Any) -> None:
        super().__init__(method, 4, parts, **options)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        self.accelerator.scaler = self.optimizer.scaler = self.scaler
        optimizer = self.optimizer.optimizer
        self.optimizer._accelerate_step_called = False
        self.optimizer._optimizer_original_step_method = optimizer.step
        self.optimizer._optimizer_patched_step_method = patch_optimizer_step(
            self.optimizer, optimizer.step
        )
        self.accumulation = SharpnessAwareAccumulation(
            self.accelerator, self.optimizer, self.forward
        )


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("method", list(METHODS))
def test_scaled_losses(method: str, parts: int) -> None:
    loop, expected = ScalingLoop(method, parts).run(), Loop(method, 4, parts).run()
    assert_same(loop.model, expected.model)
    assert loop.scaler.get_scale() == 2.0**10
    assert loop.evaluations == expected.evaluations


def half(path: str) -> None:
    """Train in one of two processes; each takes every second batch."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # or Accelerate warns that it sets it
    torch.set_num_threads(1)
    loop = Loop("wsam", 2, 2).run()
    if loop.accelerator.is_main_process:
        torch.save(loop.model.state_dict(), path)


@pytest.mark.skipif("fork" not in get_all_start_methods(), reason="processes cannot be forked")
def test_two_processes_equal_one(tmp_path: Path) -> None:
    debug_launcher(half, (str(tmp_path / "weights"),), num_processes=2)
    found = torch.load(tmp_path / "weights")
    # Accelerate steps a scheduler once for every process.
    for name, wanted in expected_of("wsam", 4, 2, period=1).state_dict().items():
        torch.testing.assert_close(found[name], wanted, rtol=1e-12, atol=1e-13)
