"""A training that kills its own process at a point of a step; tests resume it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch

from benchmarks.reliability.fault_subjects import SUBJECTS, Run, Snapshot
from wsam_fused import engine
from wsam_fused.plan import Point

STEPS = 5
# The step in which the process is killed; the checkpoint of the one before it is there.
KILLED_IN = 3
FILE = "checkpoint.pt"
# g1 and g2: within the evaluation, when its gradients are there.
WHERE = ("g1", "perturbation", "g2", "update", "checkpoint")


def save(run: Run, number: int, folder: Path) -> None:
    """Save what a resumption needs; a reader finds the old checkpoint or the new one, whole."""
    checkpoint = {
        "params": [param.detach() for param in run.params],
        "optimizer": run.optimizer.state_dict(),
        "next": number + 1,
    }
    unfinished = folder / f"{FILE}.unfinished"
    torch.save(checkpoint, unfinished)
    os.replace(unfinished, folder / FILE)


def resumed(name: str, backend: str, folder: Path) -> Snapshot:
    """Go on from the checkpoint to the end."""
    run = Run(SUBJECTS[name], backend)
    checkpoint = torch.load(folder / FILE, weights_only=True)
    with torch.no_grad():
        for param, value in zip(run.params, checkpoint["params"], strict=True):
            param.copy_(value)
    run.optimizer.load_state_dict(checkpoint["optimizer"])
    for number in range(checkpoint["next"], STEPS):
        run.step(number)
    return run.snapshot()


def uninterrupted(name: str, backend: str) -> Snapshot:
    """Make all steps."""
    run = Run(SUBJECTS[name], backend)
    for number in range(STEPS):
        run.step(number)
    return run.snapshot()


def kill() -> NoReturn:
    """End this process as the system does, without a chance to clean up."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("unreachable")


def train(name: str, backend: str, where: str, folder: str) -> None:
    """Train with a checkpoint after every step, until killed."""
    torch.set_num_threads(1)
    run = Run(SUBJECTS[name], backend)
    for number in range(STEPS):
        if number == KILLED_IN:
            _arm(run, backend, where)
        run.step(number)
        save(run, number, Path(folder))


def _arm(run: Run, backend: str, where: str) -> None:
    if where in ("g1", "g2"):
        evaluation = int(where == "g2")

        def disturb(number: int, has_gradients: bool) -> None:
            if has_gradients and number == evaluation:
                kill()

        run.disturb = disturb
    elif where == "perturbation":
        chosen: Any = engine.BACKENDS[backend]
        perturb = chosen.perturb

        def perturbed(tensors: Any, target: Point) -> None:
            perturb(tensors, target)
            kill()

        chosen.perturb = perturbed
    elif where == "update":

        def half(changes: list[Callable[[], object]]) -> None:
            changes[0]()
            kill()

        engine.make_together = half  # type: ignore[assignment]
    else:

        def unfinished(value: object, path: Path) -> None:
            path.write_bytes(b"half of it")
            kill()

        torch.save = unfinished  # type: ignore[assignment]
