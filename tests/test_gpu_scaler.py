"""A GradScaler on a GPU: nothing waits, and a loss scale changes no bit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import KEEPING
from gpu_training import Training

from wsam_fused.backends import BACKENDS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

FORMS = pytest.mark.parametrize("form", ["closure", "calls"])


@pytest.fixture(
    params=[name for name in ("cuda", "triton") if BACKENDS[name].unavailable() is None]
)
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend that this GPU can use."""
    return str(request.param)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature")
@pytest.mark.parametrize("method", ["sam", "gsam", "bsam"])
@FORMS
def test_a_scaled_step_never_waits_and_is_the_unscaled_one(
    form: str, method: str, backend: str, errors_on_waiting: Callable[[], None]
) -> None:
    """The scale is a power of two: nothing is rounded otherwise."""
    scaled, plain = (
        Training(backend, 0.01, method, max_grad_norm=1.0, check_finite=True) for _ in range(2)
    )
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10, growth_interval=2)
    scaled.step_with_scaler(scaler, form)
    errors_on_waiting()
    for _ in range(3):
        scaled.step_with_scaler(scaler, form)
    torch.cuda.set_sync_debug_mode("default")
    assert scaler.get_scale() == 2.0**12, "it grows after two good steps"
    for _ in range(4):
        plain.step()
    for ours, expected in zip(scaled.state(), plain.state(), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("keeping", ["none", "master", "narrow"])
@pytest.mark.parametrize("evaluation", [0, 1])
@FORMS
def test_an_overflow_skips_the_step_and_lowers_the_scale(
    form: str, evaluation: int, keeping: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = KEEPING.get(keeping, {})
    training = Training(backend, 0.01, dtype=torch.float16, **options)
    scaler = torch.amp.GradScaler("cuda", init_scale=4.0)
    training.step_with_scaler(scaler, form)
    before = training.state()
    losses = [training.loss]
    losses.insert(evaluation, lambda: Training.loss(training) * float("inf"))
    monkeypatch.setattr(training, "loss", lambda: losses.pop(0)())
    training.step_with_scaler(scaler, form)
    assert not losses
    for ours, expected in zip(training.state(), before, strict=True):
        assert torch.equal(ours, expected)
    assert scaler.get_scale() == 2.0
    monkeypatch.undo()
    training.step_with_scaler(scaler, form)
    assert not torch.equal(training.params[0], before[0])
