"""Faults in the sum of norms over two ranks, each of which has a part of every parameter."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch
from cases import BASES
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from wsam_fused import GSAM, WSAM
from wsam_fused.sums_over_ranks import SumsOverRanks

ERRORS: dict[str, type[BaseException]] = {
    "exception": RuntimeError,
    "interrupt": KeyboardInterrupt,
    "out of memory": torch.OutOfMemoryError,
}
METHODS: dict[str, Any] = {"wsam": WSAM, "gsam": GSAM}
# Which of the two sums of a step fails.
SUMS = (0, 1)
DYING = 1


class Outcome(NamedTuple):
    """What a faulty step left on one rank."""

    error: str
    is_as_before: bool
    is_perturbed: bool
    skipped: int
    goes_on: bool


class Training:
    """An optimizer of sharded parameters that is given gradients.

    Args:
        method: Of ``METHODS``.
        ranks: How many there are.
    """

    def __init__(self, method: str, ranks: int) -> None:
        self.mesh = init_device_mesh("cpu", (ranks,))
        generator = torch.Generator().manual_seed(0)
        values = [torch.randn(6, 3, generator=generator) for _ in range(2)]
        self.params = [nn.Parameter(self._part_of(v)) for v in values]
        # check_finite: both of the methods sum the second norm.
        options: dict[str, Any] = {"rho": 0.3, "restore": "backup", "check_finite": True}
        self.optimizer = METHODS[method](self.params, BASES["adamw"], **options)

    def set_gradients(self, number: int) -> None:
        """Set gradients that follow from ``number``."""
        generator = torch.Generator().manual_seed(number)
        for param in self.params:
            value = torch.randn(6, 3, generator=generator)
            param.grad = self._part_of(value)

    def _part_of(self, value: Tensor) -> Tensor:
        """Shard what all ranks have, without talking to them."""
        return distribute_tensor(value, self.mesh, [Shard(0)], src_data_rank=None)

    def step(self, number: int) -> None:
        """Make one step on the data of ``number``."""
        self.set_gradients(2 * number)
        self.optimizer.first_step(zero_grad=True)
        self.set_gradients(2 * number + 1)
        self.optimizer.second_step(zero_grad=True)

    def tensors(self) -> list[Tensor]:
        """Return copies of this rank's parts of weights and states."""
        states = [v for p in self.params for v in self.optimizer.state[p].values()]
        return [_local(tensor).detach().clone() for tensor in [*self.params, *states]]


def _local(tensor: Any) -> Tensor:
    local: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local


def _failing_step(training: Training, failing: int, error: BaseException) -> str:
    """Make a step of which a sum raises, as gloo's do on all ranks when their time is up."""
    total, calls = SumsOverRanks._all_reduced, 0

    def fail(sums: SumsOverRanks, values: Tensor, group: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == failing + 1:
            raise error
        return total(sums, values, group)

    SumsOverRanks._all_reduced = fail  # type: ignore[method-assign]
    try:
        training.step(1)
    except BaseException as raised:
        return type(raised).__name__
    finally:
        SumsOverRanks._all_reduced = total  # type: ignore[method-assign]
    return "nothing"


def _outcome(training: Training, error: str, before: list[Tensor], ranks: int, method: str) -> Any:
    now = training.tensors()
    is_perturbed, skipped = training.optimizer.is_perturbed, int(training.optimizer.skipped_steps)
    training.step(1)
    undisturbed = Training(method, ranks)
    undisturbed.step(0)
    undisturbed.step(1)
    return Outcome(
        error,
        all(map(torch.equal, before, now)),
        is_perturbed,
        skipped,
        all(map(torch.equal, training.tensors(), undisturbed.tensors())),
    )


def raising(rank: int, ranks: int) -> dict[tuple[str, int, str], Outcome]:
    """A sum raises on all ranks."""
    found = {}
    for method in METHODS:
        for failing in SUMS:
            for name, error in ERRORS.items():
                training = Training(method, ranks)
                training.step(0)
                before = training.tensors()
                raised = _failing_step(training, failing, error("injected"))
                found[method, failing, name] = _outcome(training, raised, before, ranks, method)
    return found


def poisoned(rank: int, ranks: int) -> dict[tuple[str, int], Outcome]:
    """One rank has a gradient with a NaN."""
    found = {}
    for method in METHODS:
        for evaluation in SUMS:
            training = Training(method, ranks)
            training.step(0)
            before = training.tensors()
            for number in SUMS:
                training.set_gradients(2 + number)
                if number == evaluation and rank == 0:
                    _local(training.params[1].grad)[0, 0] = float("nan")
                optimizer = training.optimizer
                (optimizer.first_step, optimizer.second_step)[number](zero_grad=True)
            found[method, evaluation] = _outcome(training, "nothing", before, ranks, method)
    return found


def dying(rank: int, ranks: int) -> Any:
    """A rank ends while it is perturbed, before the second sum."""
    training = Training("gsam", ranks)
    training.step(0)
    before = training.tensors()
    training.set_gradients(2)
    training.optimizer.first_step(zero_grad=True)
    moved = not torch.equal(training.tensors()[0], before[0])
    if rank == DYING:
        os._exit(0)
    training.set_gradients(3)
    try:
        training.optimizer.second_step()
        error = "nothing"
    except RuntimeError as raised:
        error = type(raised).__name__
    is_as_before = all(map(torch.equal, before, training.tensors()))
    return moved, Outcome(error, is_as_before, training.optimizer.is_perturbed, 0, False)
