"""What processes do that test_concurrency.py starts: they fork and spawn others."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
import torch.multiprocessing
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from wsam_fused import SAM, WSAM

# Two chunks of the kernels and more: torch divides them among its threads.
SIZE = 70_000


class Training:
    """An optimizer and its parameters, stepped with gradients that follow from the step."""

    def __init__(self, restore: str = "recompute", backend: str = "auto", seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.params = [nn.Parameter(torch.randn(n, generator=generator)) for n in (SIZE, 3)]
        options = {"lr": 0.01, "restore": restore, "backend": backend}
        self.optimizer = WSAM(self.params, torch.optim.AdamW, **options)
        self.steps = 0

    def set_gradients(self, evaluation: int) -> None:
        generator = torch.Generator().manual_seed(2 * self.steps + evaluation)
        for param in self.params:
            param.grad = torch.randn(param.shape, generator=generator)

    def step(self) -> None:
        for evaluation, call in enumerate((self.optimizer.first_step, self.optimizer.second_step)):
            self.set_gradients(evaluation)
            call(zero_grad=True)
        self.steps += 1

    def weights(self) -> Tensor:
        return torch.cat([param.detach().flatten() for param in self.params])


def after(steps: int, restore: str = "recompute") -> Tensor:
    training = Training(restore)
    for _ in range(steps):
        training.step()
    return training.weights()


def in_fork(function: Callable[[], None]) -> None:
    """Call a function in a fork of this process, and fail if it raises."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            torch.set_num_threads(1)  # as a DataLoader's workers do
            function()
            status = 0
        finally:
            os._exit(status)
    _, result = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(result) == 0, "the forked process failed"


def forked_after_steps() -> None:
    """A fork of a process that has stepped, with several threads, goes on as its parent does."""
    expected = after(4)
    torch.set_num_threads(2)
    training = Training()
    for _ in range(2):
        training.step()

    def go_on() -> None:
        for _ in range(2):
            training.step()
        assert torch.equal(training.weights(), expected)

    in_fork(go_on)
    go_on()


def forked_within_a_step() -> None:
    """Both the fork and its parent may complete the step, or leave it."""
    expected = after(3, "backup")
    training = Training(restore="backup")
    for _ in range(2):
        training.step()
    before = training.weights()
    training.set_gradients(0)
    training.optimizer.first_step(zero_grad=True)

    def leave() -> None:
        training.optimizer.restore()
        assert torch.equal(training.weights(), before)

    def complete() -> None:
        training.set_gradients(1)
        training.optimizer.second_step()
        assert torch.equal(training.weights(), expected)

    in_fork(leave)
    in_fork(complete)
    assert training.optimizer.is_perturbed
    complete()


class SteppingData(Dataset[Tensor]):
    """Makes a step of the worker's own copy of an optimizer for every sample."""

    def __init__(self, training: Training) -> None:
        self.training = training

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> Tensor:
        self.training.step()
        return self.training.weights()


def data_loader_workers() -> None:
    """Workers that are forks, made between steps and after them, neither stop nor disturb these."""
    torch.set_num_threads(2)
    training = Training()
    training.step()
    copies = SteppingData(training)
    for epoch in range(2):
        # Of one worker, so that all its steps are made one after the other. Were it no fork, torch
        # would send it the parameters in shared memory, and it would step those of its parent.
        context = torch.multiprocessing.get_context("fork")
        loader = DataLoader(
            copies, batch_size=None, num_workers=1, timeout=60, multiprocessing_context=context
        )
        for number, weights in enumerate(loader):
            assert torch.equal(weights, after(epoch + number + 2))
        assert torch.equal(training.weights(), after(epoch + 1))
        training.step()


def _step_shared(_: int, model: nn.Module, steps: int) -> None:
    torch.set_num_threads(1)
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = model(torch.ones(4, 3)).square().mean()
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)


def spawned_with_shared_memory() -> None:
    """A spawned process steps parameters in shared memory, and its parent sees it."""
    torch.manual_seed(0)
    shared, own = nn.Linear(3, 2), nn.Linear(3, 2)
    own.load_state_dict(shared.state_dict())
    shared.share_memory()
    torch.multiprocessing.spawn(_step_shared, (shared, 5), nprocs=1)
    _step_shared(0, own, 5)
    for ours, expected in zip(shared.parameters(), own.parameters(), strict=True):
        assert torch.equal(ours, expected)
