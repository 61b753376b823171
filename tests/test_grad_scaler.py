"""``torch.amp.GradScaler``, closure by closure and call by call.

A loss scale that is a power of two only shifts exponents, so a scaled run has to end with the bits
of one without. An overflow in any evaluation has to leave weights and state as they were, and the
scaler has to know of it.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import BASES, FOREIGN_BASES, METHODS, OPTIONS
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.utils._python_dispatch import TorchDispatchMode

from wsam_fused import ESAM, RWSAM, SAM, WSAM
from wsam_fused.backends import BACKENDS

SCALE = 2.0**10


def scaler_of(scale: float = SCALE) -> GradScaler:
    return GradScaler("cpu", init_scale=scale, growth_interval=1000)


class Run:
    """A small model that is trained in float64, with a scaler or without."""

    def __init__(self, method: Any, base: Any, scaler: GradScaler | None, **options: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1)).double()
        self.data = torch.randn(12, 5, dtype=torch.float64)
        self.optimizer = method(self.model.parameters(), base, **options)
        self.scaler = scaler
        self.poison: int | None = None  # the evaluation whose loss overflows
        self.evaluations = 0

    def losses_of(self, index: Tensor | None = None) -> Tensor:
        x = self.data if index is None else self.data[index]
        losses = (self.model(x).squeeze(1) - x.sum(1)).square()
        if self.evaluations == self.poison:
            losses = losses * float("inf")
        self.evaluations += 1
        return losses

    def backward(self, rows: slice = slice(None)) -> Tensor:
        loss = self.losses_of(torch.arange(12)[rows]).mean()
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        return loss

    def by_closure(self) -> None:
        self.optimizer.step(self.backward, scaler=self.scaler)
        self.update()

    def by_calls(self) -> None:
        optimizer, scaler = self.optimizer, self.scaler
        optimizer.zero_grad()
        self.backward()
        optimizer.first_step(zero_grad=True, scaler=scaler)
        if optimizer.is_perturbed:
            self.backward()
            if optimizer.evaluations == 3:
                optimizer.second_step(zero_grad=True)
                self.backward()
            optimizer.step() if scaler is None else scaler.step(optimizer)
        self.update()

    def by_parts(self) -> None:
        parts = [lambda: self.backward(slice(0, 6)), lambda: self.backward(slice(6, 12))]
        self.optimizer.step(parts, scaler=self.scaler)
        self.update()

    def by_sample(self) -> None:
        self.optimizer.step(self.losses_of, scaler=self.scaler)
        self.update()

    def update(self) -> None:
        self.evaluations = 0
        if self.scaler is not None:
            self.scaler.update()

    def tensors(self) -> list[Tensor]:
        params = list(self.model.parameters())
        states = [v for p in params for v in self.optimizer.state[p].values()]
        return [t.detach().clone() for t in [*params, *states] if isinstance(t, Tensor)]


WAYS: dict[str, Callable[[Run], None]] = {"closure": Run.by_closure, "calls": Run.by_calls}
WAY = pytest.mark.parametrize("way", WAYS)


def equal(one: Run, other: Run) -> None:
    for a, b in zip(one.tensors(), other.tensors(), strict=True):
        assert torch.equal(a, b)


def compare(way: Callable[[Run], None], method: Any, base: Any, **options: Any) -> None:
    plain = Run(method, base, None, **options)
    scaled = Run(method, base, scaler_of(), **options)
    start = plain.tensors()
    for _ in range(3):
        way(plain)
        way(scaled)
        assert scaled.scaler is not None
        assert scaled.scaler.get_scale() == SCALE
        equal(plain, scaled)
    assert not torch.equal(start[0], plain.tensors()[0])
    for name in ("grad_norm", "second_grad_norm", "cosine"):
        norm, expected = getattr(scaled.optimizer.last, name), getattr(plain.optimizer.last, name)
        if expected is not None:
            assert torch.equal(norm, expected), name


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


# ---- mistakes ------------------------------------------------------------------------------------


def weights(run: Run) -> list[Tensor]:
    return [param.detach().clone() for param in run.model.parameters()]


def test_a_closure_is_not_given_to_the_scaler() -> None:
    run = Run(WSAM, BASES["sgd"], scaler_of())
    assert run.scaler is not None
    run.backward()
    before = weights(run)
    with pytest.raises(RuntimeError, match="Closure use is not currently supported"):
        run.scaler.step(run.optimizer, closure=run.backward)
    with pytest.raises(RuntimeError, match=r"call optimizer.step\(closure, scaler=scaler\)"):
        run.scaler.step(run.optimizer, run.backward)
    assert all(map(torch.equal, weights(run), before))


def test_first_step_has_to_know_the_scaler() -> None:
    run = Run(WSAM, BASES["sgd"], scaler_of(), restore="backup")
    assert run.scaler is not None
    before = weights(run)
    run.backward()
    run.optimizer.first_step(zero_grad=True)
    run.backward()
    with pytest.raises(RuntimeError, match=r"call first_step\(zero_grad=True, scaler=scaler\)"):
        run.scaler.step(run.optimizer)
    assert all(map(torch.equal, weights(run), before))


def test_unscaled_too_early_or_stepped_twice() -> None:
    run = Run(WSAM, BASES["sgd"], scaler_of())
    scaler = run.scaler
    assert scaler is not None
    run.backward()
    scaler.unscale_(run.optimizer)
    with pytest.raises(RuntimeError, match=r"scaler.unscale_\(\) was called before"):
        run.optimizer.first_step(zero_grad=True, scaler=scaler)
    assert not run.optimizer.is_perturbed
    scaler.update()
    run.optimizer.zero_grad()
    run.optimizer.step(run.backward, scaler=scaler)
    with pytest.raises(RuntimeError, match=r"since scaler.update\(\) was called last"):
        run.optimizer.step(run.backward, scaler=scaler)
    assert not run.optimizer.is_perturbed


def test_no_scaler_at_all() -> None:
    run = Run(WSAM, BASES["sgd"], None)
    run.backward()
    with pytest.raises(TypeError, match=r"scaler is float, expected a torch\.amp"):
        run.optimizer.first_step(zero_grad=True, scaler=2.0)
    assert not run.optimizer.is_perturbed


def test_float16_without_a_scaler_warns_once() -> None:
    param = nn.Parameter(torch.randn(4, dtype=torch.float16))
    optimizer = SAM([param], BASES["sgd"])

    def closure() -> Tensor:
        loss = param.square().sum()
        loss.backward()
        return loss

    with pytest.warns(UserWarning, match="no GradScaler was given; call scaler.scale"):
        optimizer.step(closure)
    optimizer.step(closure)  # a second warning would be an error
    other = copy.deepcopy(param).detach().bfloat16().requires_grad_()
    quiet = SAM([other], BASES["sgd"])
    other.grad = torch.ones_like(other)
    quiet.first_step(zero_grad=True)


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


# ---- steps that the scaler begins: second_evaluation ---------------------------------------------


def with_second_evaluation(run: Run, *, unscales: bool = False) -> None:
    """As a framework does: backward, scaler.step(optimizer), scaler.update()."""
    optimizer, scaler = run.optimizer, run.scaler
    optimizer.zero_grad()
    run.backward()
    optimizer.second_evaluation = run.backward
    if scaler is None:
        optimizer.step()
    else:
        optimizer.second_evaluation_scaler = scaler
        if unscales:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
    run.update()


@pytest.mark.parametrize("unscales", [False, True])
@pytest.mark.parametrize("base", ["adamw", "rmsprop"])
@pytest.mark.parametrize("method", ["sam", "wsam", "gsam", "bsam"])
def test_a_scaler_makes_whole_steps(method: str, base: str, unscales: bool) -> None:
    way = functools.partial(with_second_evaluation, unscales=unscales)
    compare(way, METHODS[method], {**BASES, **FOREIGN_BASES}[base], rho=0.1)


@pytest.mark.parametrize("unscales", [False, True])
@pytest.mark.parametrize("evaluation", [0, 1])
def test_a_scaler_that_makes_whole_steps_backs_off(evaluation: int, unscales: bool) -> None:
    run = Run(WSAM, BASES["adamw"], scaler_of(), rho=0.1, restore="backup")
    with_second_evaluation(run, unscales=unscales)
    before = run.tensors()
    run.poison = evaluation
    with_second_evaluation(run, unscales=unscales)
    assert all(map(torch.equal, run.tensors(), before))
    assert run.scaler is not None
    assert run.scaler.get_scale() == SCALE / 2


def test_a_scaler_that_makes_whole_steps_has_to_be_known() -> None:
    run = Run(WSAM, BASES["sgd"], scaler_of())
    assert run.scaler is not None
    before = weights(run)
    run.backward()
    run.optimizer.second_evaluation = run.backward
    with pytest.raises(RuntimeError, match="set second_evaluation_scaler to the scaler"):
        run.scaler.step(run.optimizer)
    assert all(map(torch.equal, weights(run), before))


def test_not_with_updates_in_the_backward() -> None:
    run = Run(WSAM, BASES["sgd"], scaler_of())
    run.optimizer.update_in_backward()
    run.backward()
    with pytest.raises(RuntimeError, match=r"given a scaler while update_in_backward\(\) is"):
        run.optimizer.first_step(zero_grad=True, scaler=run.scaler)
    assert not run.optimizer.is_perturbed


@pytest.mark.parametrize("way", ["calls", "second_evaluation"])
def test_an_overflow_does_not_skip_later_steps(way: str) -> None:
    """With ``every``, the steps after it are plain ones, of which the scaler says nothing."""
    run = Run(SAM, BASES["sgd"], scaler_of(), rho=0.1, every=3)
    make = Run.by_calls if way == "calls" else with_second_evaluation
    assert run.scaler is not None
    moved = []
    for number in range(1, 8):
        before = weights(run)
        run.poison = 1 if number == 3 else None
        make(run)
        moved.append(not all(map(torch.equal, weights(run), before)))
    assert run.scaler.get_scale() == SCALE / 2
    assert moved[3:] == [True] * 4


def test_ways_of_scaling_may_change_after_an_overflow() -> None:
    run = Run(SAM, BASES["sgd"], scaler_of(), rho=0.1)
    assert run.scaler is not None
    run.poison = 1
    run.by_calls()
    run.poison = None
    before = weights(run)
    run.by_closure()
    assert run.scaler.get_scale() == SCALE / 2
    assert not all(map(torch.equal, weights(run), before))


def test_a_step_of_the_scaler_that_fails_leaves_nothing_behind() -> None:
    run = Run(WSAM, BASES["sgd"], scaler_of(), restore="backup")
    scaler = run.scaler
    assert scaler is not None
    run.backward()
    with pytest.raises(RuntimeError, match="nothing is pending"):
        scaler.step(run.optimizer)
    scaler.update()
    run.optimizer.zero_grad()
    run.by_closure()
    run.by_calls()
    assert not run.optimizer.is_perturbed


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
