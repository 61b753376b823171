"""Verdicts follow from confidence intervals, and hyper-parameters from validation samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest

pytest.importorskip("scipy", reason="confidence intervals come from scipy")
pytest.importorskip("sklearn", reason="the experiments train on scikit-learn's data sets")
pytest.importorskip("matplotlib", reason="the experiments draw pictures")
pytest.importorskip("tqdm", reason="the experiments show progress bars")

from scipy import stats

from benchmarks.paper import protocol
from benchmarks.paper.experiment import AGREES, CANNOT_TELL, DISAGREES, Finding, Options
from benchmarks.paper.runs import Outcome, Spec
from benchmarks.paper.statistics import alike, difference, half_width, less

LEFT = [3.1, 2.9, 3.4, 3.0, 2.7]
RIGHT = [4.1, 3.2, 3.9, 4.4, 3.6, 5.0]


def test_difference_is_welchs() -> None:
    found = difference(LEFT, RIGHT)
    expected = stats.ttest_ind(LEFT, RIGHT, equal_var=False).confidence_interval(0.95)
    assert found.value == pytest.approx(sum(LEFT) / 5 - sum(RIGHT) / 6, rel=1e-14)
    assert found.low == pytest.approx(expected.low, rel=1e-12)
    assert found.high == pytest.approx(expected.high, rel=1e-12)


def test_half_width_is_students() -> None:
    expected = stats.t.interval(0.95, 4, sum(LEFT) / 5, stats.sem(LEFT))
    assert half_width(LEFT) == pytest.approx((expected[1] - expected[0]) / 2, rel=1e-12)


def test_verdict_follows_the_interval() -> None:
    assert less(LEFT, RIGHT)[0] == AGREES
    assert less(RIGHT, LEFT)[0] == DISAGREES
    assert less(LEFT, LEFT[::-1])[0] == CANNOT_TELL
    # Without any spread, every difference counts.
    assert less([1.0, 1.0], [2.0, 2.0])[0] == AGREES
    assert less([1.0, 1.0], [1.0, 1.0])[0] == CANNOT_TELL


def test_alike_asks_for_the_whole_interval() -> None:
    width = difference(LEFT, LEFT).high
    assert alike(LEFT, LEFT, 1.01 * width)[0] == AGREES
    assert alike(LEFT, LEFT, 0.99 * width)[0] == CANNOT_TELL
    assert alike([1.0, 1.1], [9.0, 9.1], 1.0)[0] == DISAGREES


def test_unknown_verdict_is_refused() -> None:
    with pytest.raises(ValueError, match="verdict is 'yes', expected one of"):
        Finding("", "", "", "yes")


class _Remembering:
    """Runs whose accuracy is a function of the spec."""

    def __init__(self, accuracy: Any, loss: Any = lambda spec: 1.0) -> None:
        self.accuracy, self.loss = accuracy, loss
        self.asked: list[Spec] = []

    def outcomes(self, specs: Sequence[Spec], what: str) -> list[Outcome]:
        self.asked += specs
        return [
            Outcome(0.0, 0.0, self.loss(spec), self.accuracy(spec), 0.0, None, None, None, 0.0)
            for spec in specs
        ]


def _search(runs: _Remembering, size: str = "default") -> protocol.Search:
    return protocol.Search(Options(size=size), runs)  # type: ignore[arg-type]


def _hyper(spec: Spec, name: str) -> Any:
    return dict(spec.hyper)[name]


TASK = protocol.Task("digits", "resnet-small", 30, 50)


def test_search_takes_the_best_mean_over_seeds() -> None:
    # rho 0.1 is the best of one seed, and 0.2 of the mean.
    accuracy = {0.1: (99.0, 10.0, 10.0), 0.2: (60.0, 60.0, 60.0), 0.5: (50.0, 50.0, 50.0)}
    runs = _Remembering(lambda spec: accuracy[_hyper(spec, "rho")][spec.seed - 1000])
    best = _search(runs).best({"": [TASK.spec("SAM", rho=rho) for rho in accuracy]})
    assert _hyper(best[""], "rho") == 0.2
    assert best[""].seed == 0
    assert {spec.seed for spec in runs.asked} == {1000, 1001, 1002}


def test_search_breaks_ties_by_the_loss() -> None:
    runs = _Remembering(lambda spec: 50.0, lambda spec: abs(_hyper(spec, "rho") - 0.2))
    best = _search(runs).best({"": [TASK.spec("SAM", rho=rho) for rho in (0.1, 0.2, 0.5)]})
    assert _hyper(best[""], "rho") == 0.2


def test_protocol_is_the_papers() -> None:
    """Learning rate and weight decay by SGDM, rho by SAM, the rest by each method alone."""
    best = {"lr": 0.1, "weight_decay": 5e-4, "rho": 0.05, "gamma": 0.84, "alpha": 0.03}

    def accuracy(spec: Spec) -> float:
        given = {**dataclasses.asdict(spec), **dict(spec.hyper)}
        return -sum(abs(given.get(name, value) - value) / value for name, value in best.items())

    runs = _Remembering(accuracy)
    methods = ("SGDM", "SAM", "GSAM", "WSAM")
    found = _search(runs).tuned({"a": TASK}, methods, protocol.OWN)
    assert set(found) == {("a", method) for method in methods}
    for (_, method), spec in found.items():
        assert (spec.lr, spec.weight_decay) == (0.1, 5e-4)
        assert spec.epochs == (60 if method == "SGDM" else 30)
        assert dict(spec.hyper).get("rho") == (None if method == "SGDM" else 0.05)
    assert _hyper(found["a", "WSAM"], "gamma") == 0.84
    assert _hyper(found["a", "GSAM"], "alpha") == 0.03
    # One rho for all: no other method was searched with another one.
    assert {_hyper(spec, "rho") for spec in runs.asked if spec.method == "WSAM"} == {0.05}
    assert {spec.lr for spec in runs.asked if spec.method == "SAM"} == {0.1}


def test_full_size_has_the_papers_epochs_seeds_and_batches() -> None:
    full = Options(size="full")
    assert protocol.seeds(full) == 5
    resnet = protocol.task(full, "cifar10")
    assert (resnet.model, resnet.epochs, resnet.batch_size, resnet.lr) == (
        "resnet18",
        200,
        128,
        0.05,
    )
    wide = protocol.task(dataclasses.replace(full, model="wrn28-10"), "cifar100")
    assert (wide.epochs, wide.batch_size, wide.lr) == (200, 256, 0.1)
    assert resnet.spec("SGDM").epochs == 400
