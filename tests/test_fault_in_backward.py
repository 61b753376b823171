"""An interrupt at any place of an update within the backward: every parameter is whole.

What had been updated stays so, the others are restored; see also test_in_backward_failures.py.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import torch

from benchmarks.reliability.fault_subjects import SUBJECTS, Run
from wsam_fused.in_backward import InBackwardUpdate

PLACES = 25
NAMES = ["SAM, AdamW", "WSAM, AdamW", "WSAM, AdamW, two dtypes", "SAM, AdamW, master weights"]

# Python reports an interrupt that comes while a generator is closed, and drops it.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


class Interrupt:
    """Counts the places of the hooks in an evaluation, and interrupts at one of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.place: int | None = None
        self.count = 0
        complete = InBackwardUpdate._gradient_is_complete

        def watched(handle: InBackwardUpdate, param: torch.Tensor) -> None:
            sys.setprofile(self._profile)
            try:
                complete(handle, param)
            finally:
                sys.setprofile(None)

        monkeypatch.setattr(InBackwardUpdate, "_gradient_is_complete", watched)

    def _profile(self, frame: FrameType, event: str, argument: object) -> None:
        if event not in ("call", "c_return") or frame.f_code.co_filename == __file__:
            return
        self.count += 1
        if self.count - 1 == self.place:
            signal.raise_signal(signal.SIGINT)


def whole(run: Run) -> list[list[torch.Tensor]]:
    """Copy every parameter with its states."""
    states = [sorted(run.optimizer.state[param].items()) for param in run.params]
    return [
        [param.detach().clone(), *(value.clone() for _, value in state)]
        for param, state in zip(run.params, states, strict=True)
    ]


def interrupted(
    name: str, backend: str, interrupt: Interrupt, place: int | None
) -> tuple[list[bool], Callable[[], Any]]:
    """Make a step that is interrupted; say which parameters are as before."""
    run = Run(SUBJECTS[name], backend)
    run.optimizer.update_in_backward()
    interrupt.place = None
    run.step(0)
    before = whole(run)
    interrupt.place, interrupt.count = place, 0
    try:
        run.step(1)
    except KeyboardInterrupt:
        torch.set_grad_enabled(True)
    interrupt.place = None
    assert not run.optimizer.is_perturbed
    twin = Run(SUBJECTS[name], backend)
    twin.step(0)
    twin.step(1)
    kept = []
    for now, then, updated in zip(whole(run), before, whole(twin), strict=True):
        is_kept = all(map(torch.equal, now, then))
        assert is_kept or all(map(torch.equal, now, updated)), f"half-updated at place {place}"
        kept.append(is_kept)
    return kept, lambda: run.step(1)


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_is_whole(name: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt = Interrupt(monkeypatch)
    kept, _ = interrupted(name, backend, interrupt, None)
    assert not any(kept), "nothing interrupted it"
    places = interrupt.count
    assert places > 100
    found = set()
    for place in range(0, places, places // PLACES):
        kept, go_on = interrupted(name, backend, interrupt, place)
        found.add(sum(kept))
        go_on()
    assert len(found) > 1, "it was interrupted before some updates and after others"
