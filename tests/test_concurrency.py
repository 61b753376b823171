"""Several threads, several processes: each optimizer does what it does alone, or says why not.

One optimizer belongs to one thread at a time. Forks have one thread (``torch.set_num_threads(1)``),
as in DataLoader workers: with more, torch's own operations wait for ever for threads that a fork
does not have.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any

import concurrency_cases
import pytest
import torch
from concurrency_cases import Training
from processes import run_apart
from torch import Tensor

from wsam_fused import SAM, WSAM

# Triton's interpreter and the emulated GPU exist once in a process.
NATIVE = ("cpu", "eager")
TIMEOUT = 60.0


def in_threads(functions: Sequence[Callable[[], Any]]) -> None:
    """Call all functions at the same time, and fail if one does."""
    errors: list[BaseException] = []
    start = threading.Barrier(len(functions))

    def call(function: Callable[[], Any]) -> None:
        try:
            start.wait(TIMEOUT)
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=call, args=(f,), daemon=True) for f in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT)
    assert not any(thread.is_alive() for thread in threads), f"not done after {TIMEOUT} s"
    if errors:
        raise errors[0]


@pytest.mark.parametrize(("backend", "torch_threads"), [("cpu", 1), ("cpu", 2), ("eager", 1)])
def test_optimizers_in_threads_do_not_disturb_each_other(
    backend: str, torch_threads: int, threads: None
) -> None:
    torch.set_num_threads(torch_threads)
    trainings = [Training(backend=backend, seed=seed) for seed in range(3)]
    alone = [Training(backend=backend, seed=seed) for seed in range(3)]

    def train(training: Training) -> None:
        for _ in range(10):
            training.step()

    in_threads([functools.partial(train, training) for training in trainings])
    for training, expected in zip(trainings, alone, strict=True):
        train(expected)
        assert torch.equal(training.weights(), expected.weights())


@pytest.mark.parametrize("backend", NATIVE)
def test_a_step_beside_the_backward_of_another_model(backend: str) -> None:
    """Autograd and autocast keep what they know apart by thread; ours is the optimizer's."""
    done = threading.Event()
    losses = []

    def train_another() -> None:
        model = torch.nn.Sequential(
            torch.nn.Linear(20, 20), torch.nn.Tanh(), torch.nn.Linear(20, 1)
        )
        weights = [p.detach().clone() for p in model.parameters()]
        while not done.is_set():
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(torch.ones(8, 20)).square().mean()
            model.zero_grad()
            loss.backward()
            losses.append(loss.item())
        pairs = zip(model.parameters(), weights, strict=True)
        assert all(torch.equal(p, w) for p, w in pairs)

    training, alone = Training(backend=backend), Training(backend=backend)

    def train() -> None:
        try:
            for _ in range(10):
                training.step()
        finally:
            done.set()

    in_threads([train_another, train])
    assert losses and len(set(losses)) == 1
    for _ in range(10):
        alone.step()
    assert torch.equal(training.weights(), alone.weights())


def test_a_second_thread_is_refused_and_the_first_goes_on(backend: str) -> None:
    """Its error must not put the weights back under the hands of the first one."""

    def train(closure_of: Callable[[Any, Callable[[], Tensor]], Callable[[], Tensor]]) -> Tensor:
        torch.manual_seed(0)
        param = torch.nn.Parameter(torch.randn(5, dtype=torch.float64))
        optimizer = WSAM([param], torch.optim.AdamW, lr=0.1, rho=0.5, backend=backend)

        def plain() -> Tensor:
            optimizer.zero_grad()
            loss = param.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure_of(optimizer, plain))
        assert not optimizer.is_perturbed
        in_threads([lambda: optimizer.step(plain)])  # one after the other is no mistake
        return param.detach()

    refused = []

    def disturbed(optimizer: Any, plain: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def interfere() -> None:
            calls = {
                "step": lambda: optimizer.step(plain),
                "first_step": optimizer.first_step,
                "second_step": optimizer.second_step,
                "restore": optimizer.restore,
            }
            for name, call in calls.items():
                with pytest.raises(RuntimeError, match=rf"^{name}\(\) .* in thread 'Thread-"):
                    call()
                refused.append(optimizer.is_perturbed)

        def closure() -> Tensor:
            in_threads([interfere])
            return plain()

        return closure

    expected = train(lambda optimizer, plain: plain)
    assert torch.equal(train(disturbed), expected)
    assert refused == [False] * 4 + [True] * 4


def test_a_step_in_two_threads_never_moves_the_weights_silently() -> None:
    """Of steps that change nothing, each is made or refused, and none is lost half-way."""
    param = torch.nn.Parameter(torch.randn(200, 200))
    before = param.detach().clone()
    optimizer = SAM([param], torch.optim.SGD, lr=0.0, rho=0.5, restore="backup")
    made = []

    def closure() -> Tensor:
        loss = param.square().sum()
        (param.grad,) = torch.autograd.grad(loss, param)
        return loss

    def train() -> None:
        for _ in range(100):
            try:
                optimizer.step(closure)
            except RuntimeError as error:
                assert "another thread" in str(error)
            else:
                made.append(1)

    in_threads([train, train])
    assert torch.equal(param, before)
    assert optimizer.param_groups[0]["sam_step"] == len(made) >= 1


@pytest.mark.parametrize("fails", [False, True], ids=["complete", "fails"])
def test_autograd_may_call_the_optimizer_in_a_thread_of_its_own(fails: bool, backend: str) -> None:
    """As it does for a GPU: hooks update within the step of the thread that waits for them."""

    def train(run: Callable[[Callable[[], Any]], Any]) -> list[Tensor]:
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(5, dtype=torch.float64)) for _ in range(2)]
        before = params[1].detach().clone()
        optimizer = SAM(params, torch.optim.SGD, lr=0.1, restore="backup", backend=backend)
        optimizer.update_in_backward()

        def closure() -> Tensor:
            optimizer.zero_grad()
            twice = fails and optimizer.is_perturbed
            for part in [params[:1]] * 2 if twice else [params]:
                loss = torch.cat(part).square().sum()
                run(loss.backward)
            return loss

        if fails:
            with pytest.raises(RuntimeError, match="was completed twice"):
                optimizer.step(closure)
            assert torch.equal(params[1], before)
        else:
            optimizer.step(closure)
            assert not torch.equal(params[1], before)
        assert not optimizer.is_perturbed
        return [param.detach() for param in params]

    pairs = zip(train(lambda function: in_threads([function])), train(_call), strict=True)
    assert all(torch.equal(apart, here) for apart, here in pairs)


def _call(function: Callable[[], Any]) -> None:
    function()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes cannot be forked")
@pytest.mark.parametrize(
    "case",
    [
        concurrency_cases.forked_after_steps,
        concurrency_cases.forked_within_a_step,
        concurrency_cases.data_loader_workers,
    ],
)
def test_forks(case: Callable[[], None]) -> None:
    run_apart(case)


def test_a_spawned_process_steps_shared_memory() -> None:
    run_apart(concurrency_cases.spawned_with_shared_memory)
