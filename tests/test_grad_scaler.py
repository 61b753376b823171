"""``torch.amp.GradScaler``, closure by closure and call by call.

A loss scale that is a power of two only shifts exponents, so a scaled run has to end with the bits
of one without. An overflow in any evaluation has to leave weights and state as they were, and the
scaler has to know of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import BASES, FOREIGN_BASES, METHODS, OPTIONS
from scaled_run import SCALE, WAY, WAYS, Run, compare, equal, scaler_of, weights
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.utils._python_dispatch import TorchDispatchMode

from wsam_fused import ESAM, RWSAM, SAM, WSAM
from wsam_fused.backends import BACKENDS


@WAY
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("method", ["sam", "wsam", "coupled", "gsam", "bsam"])
def test_scaled_steps_are_the_same(method: str, option: str, way: str, backend: str) -> None:
    compare(WAYS[way], METHODS[method], BASES["adamw"], backend=backend, **OPTIONS[option])


@WAY
@pytest.mark.parametrize("base", ["sgd-l2", "nesterov", "amsgrad", "rmsprop"])
def test_scaled_steps_are_the_same_over_bases(base: str, way: str) -> None:
    bases = {**BASES, **FOREIGN_BASES}
    compare(WAYS[way], METHODS["wsam"], bases[base], rho=0.1)


@pytest.mark.parametrize("method", ["sam", "wsam", "gsam"])
def test_scaled_micro_batches_are_the_same(method: str) -> None:
    compare(Run.by_parts, METHODS[method], BASES["sgdm"], rho=0.1)


@pytest.mark.parametrize("method", [ESAM, RWSAM])
def test_scaled_losses_of_samples_are_the_same(method: Any) -> None:
    compare(Run.by_sample, method, BASES["sgdm"], rho=0.1)


@WAY
@pytest.mark.parametrize("every", [1, 2])
def test_every(every: int, way: str) -> None:
    compare(WAYS[way], SAM, BASES["sgdm"], rho=0.1, every=every)


@WAY
@pytest.mark.parametrize("base", ["adamw", "rmsprop"])
@pytest.mark.parametrize("method", ["sam", "wsam", "gsam", "bsam"])
def test_overflow_leaves_everything_as_it_was(
    method: str, base: str, way: str, backend: str
) -> None:
    bases = {**BASES, **FOREIGN_BASES}
    run = Run(METHODS[method], bases[base], scaler_of(), rho=0.1, restore="backup", backend=backend)
    WAYS[way](run)
    assert run.scaler is not None
    for evaluation in range(run.optimizer.evaluations):
        before, scale = run.tensors(), run.scaler.get_scale()
        run.poison = evaluation
        WAYS[way](run)
        for now, then in zip(run.tensors(), before, strict=True):
            assert torch.equal(now, then)
        assert run.scaler.get_scale() == scale / 2, "the scaler backs off"
        run.poison = None
        WAYS[way](run)
        assert not torch.equal(run.tensors()[0], before[0]), "the next step is an ordinary one"
        assert run.scaler.get_scale() == scale / 2
    assert run.optimizer.skipped_steps == run.optimizer.evaluations


@pytest.mark.parametrize(("method", "way"), [(SAM, Run.by_parts), (ESAM, Run.by_sample)])
@pytest.mark.parametrize("evaluation", [0, 1, 2])
def test_overflow_elsewhere(method: Any, way: Callable[[Run], None], evaluation: int) -> None:
    run = Run(method, BASES["sgdm"], scaler_of(), rho=0.1, restore="backup")
    way(run)
    before = run.tensors()
    run.poison = evaluation
    way(run)
    assert run.scaler is not None
    if method is ESAM and evaluation == 1:  # only tells which samples are taken
        assert run.scaler.get_scale() == SCALE
        return
    assert run.scaler.get_scale() == SCALE / 2
    for now, then in zip(run.tensors(), before, strict=True):
        assert torch.equal(now, then)


def test_the_last_gradients_may_be_unscaled_by_the_user() -> None:
    plain, scaled = Run(WSAM, BASES["adamw"], None), Run(WSAM, BASES["adamw"], scaler_of())
    plain.by_calls()
    optimizer, scaler = scaled.optimizer, scaled.scaler
    assert scaler is not None
    scaled.backward()
    optimizer.first_step(zero_grad=True, scaler=scaler)
    scaled.backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    equal(plain, scaled)


def test_a_scaler_that_is_switched_off() -> None:
    plain = Run(WSAM, BASES["adamw"], None)
    off = Run(WSAM, BASES["adamw"], GradScaler("cpu", enabled=False))
    for way in WAYS.values():
        way(plain)
        way(off)
        equal(plain, off)


class _Reads(TorchDispatchMode):
    """Counts what makes the host wait, were the tensor on a device: reads of a value."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@WAY
def test_a_scaler_adds_no_waiting(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables on the host are read, as always, and nothing else; update() waits, as it does."""
    reads = []
    monkeypatch.setattr(Run, "update", lambda self: None)
    for scaler in (None, scaler_of()):
        run = Run(WSAM, BASES["adamw"], scaler, backend="cpu")
        WAYS[way](run)  # sets up the tables
        if scaler is not None:
            scaler.update()
        with _Reads() as found:
            WAYS[way](run)
        reads.append(found.count)
    assert reads[0] == reads[1] > 0


@pytest.mark.parametrize(("way", "wanted"), [("closure", 2), ("calls", 1)])
def test_one_more_read_of_the_last_gradients(
    way: str, wanted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Call by call the scaler reads them itself."""
    reads = []
    reduce = BACKENDS["cpu"].reduce

    def counted(tensors: Any, evaluation: int, **options: Any) -> None:
        reads.append(evaluation)
        reduce(tensors, evaluation, **options)

    monkeypatch.setattr(BACKENDS["cpu"], "reduce", counted)
    WAYS[way](Run(WSAM, BASES["adamw"], scaler_of(), backend="cpu"))
    assert len(reads) == wanted


def test_float16_autocast_learns() -> None:
    """Float32 parameters, a forward in float16, scaled losses: what most people mean by AMP."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 1))
    x = torch.randn(64, 6)
    y = x.sum(1, keepdim=True).sin()
    optimizer = WSAM(model.parameters(), torch.optim.AdamW, rho=0.02, gamma=0.5, lr=1e-2)
    scaler = GradScaler("cpu", init_scale=2.0**18, growth_interval=20)

    def closure() -> Tensor:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = nn.functional.mse_loss(model(x).float(), y)
        scaler.scale(loss).backward()
        return loss

    losses = []
    for _ in range(60):
        losses.append(optimizer.step(closure, scaler=scaler).item())
        scaler.update()
    assert losses[-1] < 0.3 * losses[0]
    assert optimizer.skipped_steps > 0, "the scale began too high, and was to come down"


@pytest.mark.parametrize("way", WAYS)
def test_recomputed_weights_of_a_skipped_step_are_within_a_unit(way: str) -> None:
    """Without a copy of w an overflow in g2 leaves the state as it was, and w but for rounding."""
    run = Run(WSAM, BASES["adamw"], scaler_of(), rho=0.1)
    WAYS[way](run)
    before = run.tensors()
    run.poison = 1
    WAYS[way](run)
    for i, (now, then) in enumerate(zip(run.tensors(), before, strict=True)):
        if i < len(weights(run)):
            torch.testing.assert_close(now, then, rtol=2.0**-51, atol=2.0**-54)
        else:
            assert torch.equal(now, then)
