"""The fault matrix: every fault at every point of a step, and what is promised afterwards.

The cells are those of ``benchmarks/reliability/fault_matrix.py``; the command that writes
docs/reliability/faults.md tries more places of a step than this does.
"""

from __future__ import annotations

import ctypes
import functools
import signal
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from benchmarks.readme import filled
from benchmarks.reliability import faults
from benchmarks.reliability.fault_cases import applies, broken, trials, was_dropped
from benchmarks.reliability.fault_injection import Everywhere, in_evaluation, interrupt
from benchmarks.reliability.fault_matrix import GAPS, MATRIX, Kind, Point, why_empty
from benchmarks.reliability.fault_subjects import PEERS, SUBJECTS, Run
from benchmarks.reliability.fault_trials import Left, no_fault, observe
from wsam_fused import _extension, engine

PLACES = 3

# Python's own functions look for signals before they return.
_raise_in_c = ctypes.CDLL(None)["raise"]

# Python reports an interrupt that comes while a generator is closed, and drops it.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

BACKENDS = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(
            name == "cpu" and _extension.UNAVAILABLE is not None, reason=str(_extension.UNAVAILABLE)
        ),
    )
    for name in faults.BACKENDS
]
CASES = [
    pytest.param(point, kind, name, id=f"{point.name}-{kind.name}-{name}")
    for point, kind in MATRIX
    for name, subject in SUBJECTS.items()
    if applies(point, kind, subject)
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("point", "kind", "name"), CASES)
def test_promises_are_kept(point: Point, kind: Kind, name: str, backend: str) -> None:
    if (name, backend, point, kind) in GAPS:
        pytest.skip("a gap that is documented, and tested below")
    subject = SUBJECTS[name]
    tried = 0
    for trial in trials(point, kind, subject, backend, PLACES):
        seen = observe(subject, backend, trial.fault, trial.prepare)
        if was_dropped(kind, seen):
            continue
        assert trial.happened(), trial.name
        problem = broken(point, kind, subject, seen)
        assert problem is None, f"{trial.name}: {problem}"
        tried += 1
    assert tried


@pytest.mark.parametrize("gap", GAPS, ids=str)
def test_gaps_are_as_narrow_as_they_say(gap: tuple[str, str, Point, Kind]) -> None:
    """The promise is broken somewhere, or the gap could be closed; never are weights perturbed."""
    name, backend, point, kind = gap
    subject = SUBJECTS[name]
    seen = [
        observe(subject, backend, trial.fault, trial.prepare)
        for trial in trials(point, kind, subject, backend, 40)
    ]
    lefts = {one.left for one in seen}
    assert Left.OTHER in lefts
    assert lefts <= {Left.OTHER, Left.AS_BEFORE}
    assert not any(one.is_perturbed for one in seen)


# ---- that the trials see what they are for ---------------------------------------------------


def test_every_cell_is_a_promise_or_has_a_reason() -> None:
    for point in Point:
        for kind in Kind:
            assert (point, kind) in MATRIX or why_empty(point, kind)


@pytest.mark.parametrize("name", SUBJECTS)
def test_a_step_without_a_fault_is_the_undisturbed_one(name: str) -> None:
    seen = observe(SUBJECTS[name], "eager", no_fault)
    assert seen.left is Left.UPDATED
    assert seen.goes_on
    assert seen.error is None


def test_an_optimizer_without_a_restore_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.StepEngine, "abandon", engine.StepEngine.finish)
    subject = SUBJECTS["WSAM, AdamW"]
    seen = observe(subject, "eager", in_evaluation(1, "exception", has_gradients=True))
    assert seen.left is Left.PERTURBED
    assert broken(Point.AFTER_G2, Kind.EXCEPTION, subject, seen) == "weights left perturbed"


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_interrupt_between_two_lists_is_noticed(
    backend: str, together: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes when the first list has been updated; in a Python loop the second never is."""

    def interrupted(changes: Iterable[Callable[[], object]]) -> None:
        first, *others = changes
        changes = [first, functools.partial(_raise_in_c, signal.SIGINT), *others]
        if together:
            make_together(changes)
            return
        for change in changes:
            change()

    make_together = engine.make_together
    subject = SUBJECTS["WSAM, AdamW, two dtypes"]

    def fault(run: Run) -> Any:
        return _patched(monkeypatch, interrupted)

    seen = observe(subject, backend, fault)
    assert isinstance(seen.error, KeyboardInterrupt)
    assert seen.left is (Left.UPDATED if together else Left.HALF)
    assert seen.goes_on == together


class _patched:
    """Exchange how the engine makes changes, for a block."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, function: Any) -> None:
        self._monkeypatch = monkeypatch
        self._function = function
        self._before = engine.make_together

    def __enter__(self) -> None:
        self._monkeypatch.setattr(engine, "make_together", self._function)

    def __exit__(self, *error: object) -> None:
        self._monkeypatch.setattr(engine, "make_together", self._before)


def test_ctrl_c_twice_does_not_wait_for_a_foreign_step() -> None:
    run = Run(SUBJECTS["SAM, RMSprop"], "eager")
    run.step(0)
    reached = []

    def hook(*arguments: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        reached.append("first")
        signal.raise_signal(signal.SIGINT)
        reached.append("second")

    run.optimizer._base.register_step_pre_hook(hook)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run.step(1)
    assert reached == ["first"]
    assert signal.getsignal(signal.SIGINT) is before


def test_a_foreign_step_outside_the_main_thread() -> None:
    """Where no handler can be exchanged."""
    runs = [Run(SUBJECTS["WSAM, RMSprop"], "eager") for _ in range(2)]
    runs[0].step(0)
    with ThreadPoolExecutor(1) as threads:
        threads.submit(runs[1].step, 0).result()
    assert all(map(torch.equal, runs[0].snapshot().weights, runs[1].snapshot().weights))


def test_an_interrupt_while_the_weights_are_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second Ctrl-C, while the first is dealt with."""
    subject = SUBJECTS["WSAM, AdamW, two dtypes"]
    perturb = engine.BACKENDS["eager"].perturb
    moves = []

    def interrupted(tensors: Any, target: engine.Point) -> None:
        perturb(tensors, target)
        if target == engine.Point.WEIGHTS:
            moves.append(tensors)
            if len(moves) == 1:
                raise KeyboardInterrupt

    monkeypatch.setattr(engine.BACKENDS["eager"], "perturb", interrupted)
    seen = observe(subject, "eager", in_evaluation(1, "exception", has_gradients=True))
    assert seen.left is Left.AS_BEFORE
    assert not seen.is_perturbed
    assert seen.goes_on
    assert isinstance(seen.error, KeyboardInterrupt)


def test_a_restore_without_memory_can_be_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(SUBJECTS["WSAM, AdamW, two dtypes"], "eager")
    run.step(0)
    before = run.snapshot()
    perturb = engine.BACKENDS["eager"].perturb

    def without_memory(tensors: Any, target: engine.Point) -> None:
        if target == engine.Point.WEIGHTS and tensors.key.dtype == torch.float64:
            raise torch.OutOfMemoryError("no memory")
        perturb(tensors, target)

    with monkeypatch.context() as patch:
        patch.setattr(engine.BACKENDS["eager"], "perturb", without_memory)
        with (
            pytest.raises(torch.OutOfMemoryError, match="no memory"),
            in_evaluation(1, "exception", has_gradients=True)(run),
        ):
            run.step(1)
        assert run.optimizer.is_perturbed, "and it says so"
        with pytest.raises(RuntimeError, match="while the weights are perturbed"):
            run.optimizer.state_dict()
    run.optimizer.restore()
    assert not run.optimizer.is_perturbed
    assert all(map(torch.equal, run.snapshot().weights, before.weights))


def test_gradients_that_could_not_be_bound_are_not_left_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    subject = SUBJECTS["WSAM, AdamW, two dtypes"]
    run = Run(subject, "eager")
    bind = engine.BACKENDS["eager"].bind

    def without_memory(tensors: Any, evaluation: int, addresses: Any) -> None:
        if tensors.key.dtype == torch.float64:
            raise torch.OutOfMemoryError("no memory")
        bind(tensors, evaluation, addresses)

    for param in run.params:
        param.grad = torch.ones_like(param)
    with monkeypatch.context() as patch:
        patch.setattr(engine.BACKENDS["eager"], "bind", without_memory)
        with pytest.raises(torch.OutOfMemoryError):
            run.optimizer.first_step(zero_grad=True)
    assert not run.optimizer.is_perturbed
    assert all(param.grad is not None for param in run.params), "the gradients are still there"
    assert not any(tensors.addresses for tensors in run.optimizer._engine.lists.lists)
    run.step(0)
    other = Run(subject, "eager")
    other.step(0)
    assert all(map(torch.equal, run.snapshot().weights, other.snapshot().weights))


# ---- the peer, and the table -----------------------------------------------------------------


def test_the_harness_tells_the_peer_from_ours() -> None:
    """Ours goes through the same trial; the peer's steps are right where nothing is wrong."""
    pytest.importorskip("pytorch_optimizer")
    fault = in_evaluation(1, "exception", has_gradients=True)
    for subject in PEERS.values():
        assert observe(subject, "", no_fault).left is Left.UPDATED
        assert observe(subject, "", in_evaluation(0, "exception", has_gradients=True)).goes_on
        assert observe(subject, "", fault).left in Left
    assert observe(SUBJECTS["WSAM, AdamW"], "eager", fault).left is Left.AS_BEFORE


def test_interrupts_come_at_many_places() -> None:
    """Or the trials that say they are everywhere would show nothing."""
    subject = SUBJECTS["WSAM, AdamW"]
    for phase in range(3):
        where = Everywhere(phase, None)
        observe(subject, "eager", interrupt(where))
        assert where.count > 100


def test_the_table_is_that_of_the_results() -> None:
    text = faults.PAGE.read_text()
    command = "run python -m benchmarks.reliability faults --render"
    assert filled(text, {"matrix": faults.table()}) == text, command


def test_changes_are_made_in_order() -> None:
    made: list[int] = []
    engine.make_together([functools.partial(made.append, i) for i in range(3)])
    assert made == [0, 1, 2]
