"""Random numbers of the perturbed evaluations: those of the first one, or new ones."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import BASES
from per_sample_cases import Net
from tolerances import ONE_STEP, close
from torch import Tensor

from wsam_fused import BSAM, ESAM, GSAM, RWSAM, SAM, WSAM

F64 = torch.float64
METHODS: dict[str, Callable[..., Any]] = {"sam": SAM, "wsam": WSAM, "gsam": GSAM, "bsam": BSAM}
EACH = pytest.mark.parametrize("method", METHODS)


class Dropped:
    """A linear model behind dropout that notes every mask, and what the generator says after."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.weight = torch.nn.Parameter(torch.randn(40, dtype=F64))
        self.masks: list[Tensor] = []
        self.fail_at = 0

    def loss(self, mask: Tensor) -> Tensor:
        return (self.weight * mask).sum().square() + (mask * self.weight).square().sum()

    def evaluate(self) -> Tensor:
        mask = torch.nn.functional.dropout(torch.ones(40, dtype=F64))
        self.masks.append(mask)
        loss = self.loss(mask)
        loss.backward()
        if len(self.masks) == self.fail_at:
            raise ValueError("boom")
        return loss

    def take(self) -> list[Tensor]:
        """Return the masks since the last call."""
        found, self.masks = self.masks, []
        return found


def closure_of(model: Dropped, optimizer: Any) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        return model.evaluate()

    return closure


def equal(masks: list[Tensor]) -> list[bool]:
    return [torch.equal(mask, masks[0]) for mask in masks]


@EACH
def test_all_evaluations_of_a_step_have_the_same_masks(method: str, backend: str) -> None:
    model = Dropped()
    optimizer = METHODS[method](
        [model.weight], BASES["adamw"], rho=0.1, backend=backend, replay_rng=True
    )
    closure = closure_of(model, optimizer)
    firsts = []
    for _ in range(3):
        optimizer.step(closure)
        masks = model.take()
        assert equal(masks) == [True] * optimizer.evaluations
        firsts.append(masks[0])
    assert equal(firsts) == [True, False, False], "the next step draws new ones"


def test_without_it_they_have_masks_of_their_own() -> None:
    model = Dropped()
    optimizer = SAM([model.weight], BASES["sgd"])
    optimizer.step(closure_of(model, optimizer))
    assert equal(model.take()) == [True, False]


@EACH
def test_generators_go_on_as_if_only_the_first_evaluation_had_drawn(method: str) -> None:
    model = Dropped()
    optimizer = METHODS[method]([model.weight], BASES["sgd"], replay_rng=True)
    state = torch.get_rng_state()
    optimizer.step(closure_of(model, optimizer))
    found = torch.get_rng_state()
    torch.set_rng_state(state)
    model.evaluate()
    assert torch.equal(found, torch.get_rng_state())


@pytest.mark.parametrize("two_calls", [False, True])
def test_a_trajectory_equals_one_with_given_masks(two_calls: bool, backend: str) -> None:
    """WSAM over SGD, by its formula."""
    model = Dropped()
    optimizer = WSAM(
        [model.weight], BASES["sgd"], rho=0.1, gamma=0.8, backend=backend, replay_rng=True
    )
    w = model.weight.detach().clone()
    generator = torch.random.default_generator
    for _ in range(4):
        state = generator.get_state()
        mask = torch.nn.functional.dropout(torch.ones(40, dtype=F64))
        generator.set_state(state)
        if two_calls:
            for call in (optimizer.first_step, optimizer.second_step):
                with optimizer.same_randomness():
                    model.evaluate()
                call(zero_grad=True)
        else:
            optimizer.step(closure_of(model, optimizer))
        g1 = gradient(mask, w)
        g2 = gradient(mask, w + 0.1 * g1 / g1.norm())
        w = w - 0.05 * (g1 + 4 * (g2 - g1))
        close(model.weight.detach(), w, ONE_STEP[F64], "the weights")
        with torch.no_grad():
            w.copy_(model.weight)  # differences do not pile up


def gradient(mask: Tensor, w: Tensor) -> Tensor:
    """Of the loss above."""
    return 2 * (mask * w).sum() * mask + 2 * mask * mask * w


@pytest.mark.parametrize("method", ["sam", "wsam", "gsam"])
def test_each_micro_batch_has_masks_of_its_own(method: str, backend: str) -> None:
    model = Dropped()
    optimizer = METHODS[method]([model.weight], BASES["adamw"], backend=backend, replay_rng=True)
    state = torch.get_rng_state()
    optimizer.step([model.evaluate] * 3)
    masks = model.take()
    assert equal(masks) == [True, True] + [False] * 4
    assert all(torch.equal(masks[i], masks[i + 1]) for i in (0, 2, 4))
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    for expected in masks[::2]:
        model.evaluate()
        assert torch.equal(model.take()[0], expected)
    assert torch.equal(torch.get_rng_state(), after)


def test_plain_steps_have_nothing_to_replay() -> None:
    model = Dropped()
    optimizer = SAM([model.weight], BASES["sgd"], every=2, replay_rng=True)
    for evaluations in (1, 2, 1, 2):
        optimizer.step(closure_of(model, optimizer))
        assert equal(model.take()) == [True] * evaluations
    for step in ([model.evaluate] * 2, [model.evaluate] * 2):
        optimizer.step(step)
    assert len(model.take()) == 2 + 4
    with optimizer.same_randomness():
        model.evaluate()
    optimizer.first_step(zero_grad=True)
    assert not optimizer.is_perturbed
    model.evaluate()
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))]})


@pytest.mark.parametrize("form", ["closure", "micro-batches", "calls"])
@pytest.mark.parametrize("fail_at", [1, 2])
def test_an_exception_leaves_the_generators_after_the_first_evaluation(
    form: str, fail_at: int, backend: str
) -> None:
    model = Dropped()
    optimizer = WSAM(
        [model.weight], BASES["sgd"], backend=backend, restore="backup", replay_rng=True
    )
    before = model.weight.detach().clone()
    start = torch.get_rng_state()
    model.evaluate()
    expected = torch.get_rng_state()
    torch.set_rng_state(start)
    model.take()
    model.fail_at = fail_at

    def step() -> None:
        if form == "closure":
            optimizer.step(closure_of(model, optimizer))
        elif form == "micro-batches":
            optimizer.step([model.evaluate] * 2)
        else:
            optimizer.zero_grad()
            with optimizer.same_randomness():
                model.evaluate()
            optimizer.first_step(zero_grad=True)
            with optimizer.same_randomness():
                model.evaluate()
            optimizer.second_step(zero_grad=True)

    with pytest.raises(ValueError, match="boom"):
        step()
    optimizer.restore()
    assert torch.equal(torch.get_rng_state(), expected)
    assert torch.equal(model.weight, before)
    model.fail_at = 0
    step()
    assert equal(model.take()[fail_at:][:2]) == [True, True]
    assert not torch.equal(model.weight, before)


def test_calls_without_the_block_are_refused(backend: str) -> None:
    model = Dropped()
    optimizer = SAM(
        [model.weight], BASES["sgd"], backend=backend, restore="backup", replay_rng=True
    )
    before = model.weight.detach().clone()
    model.evaluate()
    with pytest.raises(RuntimeError, match=r"first_step\(\).*replay_rng=True.*same_randomness"):
        optimizer.first_step(zero_grad=True)
    assert model.weight.grad is not None
    optimizer.zero_grad()
    with optimizer.same_randomness():
        model.evaluate()
    optimizer.first_step(zero_grad=True)
    assert not torch.equal(model.weight, before)
    model.evaluate()
    with pytest.raises(RuntimeError, match=r"second_step\(\).*replay_rng=True.*same_randomness"):
        optimizer.second_step()
    assert not optimizer.is_perturbed
    assert torch.equal(model.weight, before)


def test_blocks_in_the_wrong_order_are_refused() -> None:
    model = Dropped()
    optimizer = SAM([model.weight], BASES["sgd"])  # the option is not needed for the blocks
    model.evaluate()
    optimizer.first_step(zero_grad=True)
    with pytest.raises(RuntimeError, match="the first evaluation was not made within it"):
        with optimizer.same_randomness():
            pass
    optimizer.restore()
    for _ in range(2):
        with optimizer.same_randomness():
            model.evaluate()
        with pytest.raises(RuntimeError, match=r"twice for evaluation 1.*restore\(\)"):
            with optimizer.same_randomness():
                pass
        optimizer.restore()
    with optimizer.same_randomness():
        model.evaluate()
    optimizer.first_step(zero_grad=True)
    with optimizer.same_randomness():
        model.evaluate()
    with pytest.raises(RuntimeError, match="twice for evaluation 2"):
        with optimizer.same_randomness():
            pass
    optimizer.second_step(zero_grad=True)
    assert equal(model.take()[-2:]) == [True, True]


def test_three_evaluations_call_by_call(backend: str) -> None:
    model = Dropped()
    optimizer = BSAM([model.weight], BASES["sgd"], backend=backend, replay_rng=True)
    for _ in range(2):
        for call in (optimizer.first_step, optimizer.second_step, optimizer.third_step):
            with optimizer.same_randomness():
                model.evaluate()
            call(zero_grad=True)
        assert equal(model.take()) == [True] * 3


def test_copies_keep_the_option() -> None:
    model = Dropped()
    optimizer = WSAM([model.weight], BASES["adamw"], replay_rng=True)
    optimizer.step(closure_of(model, optimizer))
    optimizer.load_state_dict(optimizer.state_dict())
    for one in (optimizer, copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        model.weight = one.param_groups[0]["params"][0]
        model.take()
        one.step(closure_of(model, one))
        assert equal(model.take()) == [True, True]


@pytest.mark.parametrize(("replay_rng", "same"), [(False, False), (True, True)])
def test_rwsam_replays_the_second_evaluation_if_asked(
    replay_rng: bool, same: bool, backend: str
) -> None:
    """The losses that it compares have the same masks in any case."""
    masks = []

    class Noted(Net):
        def __call__(self, index: Tensor | None = None) -> Tensor:
            state = torch.get_rng_state()
            masks.append(torch.rand(5))
            torch.set_rng_state(state)
            return super().__call__(index)

    net = Noted(dropout=0.5)
    optimizer = RWSAM(
        net.model.parameters(), BASES["sgd"], delta=0.01, backend=backend, replay_rng=replay_rng
    )
    for _ in range(2):
        masks.clear()
        optimizer.step(net)
        assert equal(masks) == [True, True, same]


def test_esam_refuses_it() -> None:
    with pytest.raises(ValueError, match="replay_rng is True, expected False"):
        ESAM([torch.nn.Parameter(torch.ones(1))], torch.optim.SGD, lr=0.1, replay_rng=True)
    rwsam = RWSAM([torch.nn.Parameter(torch.ones(1))], torch.optim.SGD, lr=0.1)
    with pytest.raises(RuntimeError, match=r"RWSAM has no same_randomness\(\)"):
        rwsam.same_randomness()


def test_a_captured_graph_cannot_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Dropped()
    optimizer = SAM([model.weight], BASES["sgd"], replay_rng=True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="which a CUDA graph cannot capture"):
        optimizer.step(closure_of(model, optimizer))
    assert model.take() == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_masks_of_a_gpu_are_replayed_too() -> None:
    weight = torch.nn.Parameter(torch.ones(1000, device="cuda"))
    optimizer = SAM([weight], functools.partial(torch.optim.SGD, lr=0.1), replay_rng=True)
    masks = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        masks.append(torch.nn.functional.dropout(torch.ones_like(weight)))
        loss = (weight * masks[-1]).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    optimizer.step(closure)
    assert equal(masks) == [True, True, False, False]
    assert torch.equal(masks[2], masks[3])
