"""SGD with WSAM and its convergence theorems: the formulas, the bounds, the rates, the report."""

from __future__ import annotations

import csv
import dataclasses
import math
import operator
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn", reason="the data are scikit-learn's")
pytest.importorskip("matplotlib", reason="the report has a picture")
pytest.importorskip("tqdm", reason="the experiment shows a progress bar")

from threadpoolctl import threadpool_limits

from benchmarks.paper import convergence
from benchmarks.paper.convergence import convex, nonconvex
from benchmarks.paper.convergence.agreement import agreement
from benchmarks.paper.convergence.logistic import LogisticRegression
from benchmarks.paper.convergence.outcomes import bound_verdict, exponent, rate_verdict
from benchmarks.paper.convergence.parallel import computed
from benchmarks.paper.convergence.sgd_with_wsam import Setting, run
from benchmarks.paper.experiment import AGREES, CANNOT_TELL, DISAGREES, Options
from benchmarks.paper.report import write

_PENALISED = LogisticRegression(penalty=0.1)
_POINT = np.random.default_rng(1).standard_normal(_PENALISED.size)
_ROWS = np.random.default_rng(2).integers(569, size=8)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """On matrices as small as these, threads only wait for each other."""
    with threadpool_limits(1):
        yield


def _torch_loss(weights: torch.Tensor, rows: np.ndarray | slice, penalty: float) -> torch.Tensor:
    samples = torch.from_numpy(_PENALISED.samples[rows].copy())
    squares = weights * weights
    loss = torch.nn.functional.softplus(-(samples @ weights)).mean()
    return loss + penalty * (squares / (1.0 + squares)).sum()


@pytest.mark.parametrize("penalty", [0.0, 0.1])
@pytest.mark.parametrize("rows", [_ROWS, slice(None)], ids=["batch", "all"])
def test_loss_and_gradient_are_those_of_autograd(rows: np.ndarray | slice, penalty: float) -> None:
    problem = LogisticRegression(penalty)
    weights = torch.from_numpy(_POINT.copy()).requires_grad_()
    loss = _torch_loss(weights, rows, penalty)
    loss.backward()
    found = problem.gradient(_POINT, problem.samples[rows])
    # Sums of up to 569 numbers of the size of 1: some hundred roundings.
    np.testing.assert_allclose(found, weights.grad, rtol=1e-12, atol=1e-14)
    if isinstance(rows, slice):
        np.testing.assert_allclose(problem.full_loss(_POINT), loss.item(), rtol=1e-13)
        stacked = problem.full_gradients(np.stack([_POINT, 2.0 * _POINT]))
        np.testing.assert_allclose(stacked[0], found, rtol=1e-12, atol=1e-14)
    elif penalty == 0.0:
        losses = problem.batch_losses(_POINT[None], _ROWS[None])
        np.testing.assert_allclose(losses, [loss.item()], rtol=1e-13)


@pytest.mark.parametrize("rows", [_ROWS, slice(None)], ids=["batch", "all"])
def test_smoothness_is_the_largest_curvature_there_is(rows: np.ndarray | slice) -> None:
    def curvatures(point: np.ndarray) -> np.ndarray:
        loss = lambda weights: _torch_loss(weights, rows, 0.1)  # noqa: E731
        hessian = torch.autograd.functional.hessian(loss, torch.from_numpy(point))
        return np.linalg.eigvalsh(hessian.numpy())

    if isinstance(rows, slice):
        smoothness = _PENALISED.full_smoothness()
        least = _PENALISED.least_curvature(_POINT)
        np.testing.assert_allclose(least, curvatures(_POINT)[0], rtol=0, atol=1e-12)
    else:
        smoothness = _PENALISED.batch_smoothness(rows[None])[0]
    # At zero it is reached, elsewhere not passed.
    np.testing.assert_allclose(curvatures(np.zeros_like(_POINT))[-1], smoothness, rtol=1e-10)
    for scale in (0.1, 1.0, 3.0):
        assert np.abs(curvatures(scale * _POINT)).max() < smoothness


def test_the_nonconvex_problem_is_not_convex_where_it_begins() -> None:
    assert nonconvex.PROBLEM.least_curvature(nonconvex.start()) < -0.01


@pytest.mark.parametrize("constant_rho", [False, True])
def test_run_is_algorithm_3(constant_rho: bool) -> None:
    problem = convex.PROBLEM
    setting = Setting(gamma=0.8, alpha=0.5, rho=0.7, constant_rho=constant_rho, box=0.2)
    record = run(problem, setting, _POINT * 0.1, steps=5, seed=3)
    weights = _POINT * 0.1
    for step, batch in enumerate(record.batches, start=1):
        samples = problem.samples[batch]
        np.testing.assert_allclose(record.points[step - 1], weights, rtol=1e-12, atol=1e-14)
        first = problem.gradient(weights, samples)
        rho = 0.7 if constant_rho else 0.7 / math.sqrt(step)
        moved = rho * first / (np.linalg.norm(first) + 1e-12)
        second = problem.gradient(weights + moved, samples)
        sharp = 0.8 / 0.2 * second + (1.0 - 2.0 * 0.8) / 0.2 * first
        weights = np.clip(weights - 0.5 / math.sqrt(step) * sharp, -0.2, 0.2)
        both = np.stack([first, second])
        np.testing.assert_allclose(record.gradients[step - 1], both, rtol=1e-11, atol=1e-13)
    np.testing.assert_allclose(record.end, weights, rtol=1e-12, atol=1e-14)
    assert np.abs(record.end).max() == 0.2  # the box is felt


def test_best_point_is_where_no_coordinate_can_improve() -> None:
    batches = np.random.default_rng(4).integers(569, size=(200, 8))
    best, loss = convex.best_in_hindsight(batches, 1.0)
    assert np.abs(best).max() == 1.0
    mean = convex.PROBLEM.gradient(best, convex.PROBLEM.samples[batches.ravel()])
    # Inside the box the gradient vanishes, at its walls it points out of it.
    inside = np.abs(best) < 1.0
    assert inside.any()
    np.testing.assert_allclose(mean[inside], 0.0, atol=1e-5)
    assert (mean[~inside] * best[~inside] < 0.0).all()
    at_best = np.broadcast_to(best, (len(batches), best.size))
    np.testing.assert_allclose(
        convex.PROBLEM.batch_losses(at_best, batches).sum(), loss, rtol=1e-12
    )


def test_bounds_are_the_papers() -> None:
    setting, steps = Setting(gamma=0.9, rho=0.5), 4
    n, d, g, eta = convex.PROBLEM.size, 2.0, 1.5, 3.0
    radii = 0.5 * (1.0 + 2**-0.5 + 3**-0.5 + 0.5)
    c1 = n * d**2 / 2.0 + (10 * 0.81 - 7.2 + 2.0) / 0.01 * n * g**2
    c2 = math.sqrt(n) * d * eta * 9.0
    np.testing.assert_allclose(
        convex.bound(setting, steps, d, g, eta), c1 * 2.0 + c2 * radii, rtol=1e-12
    )
    c3 = nonconvex.PROBLEM.full_loss(nonconvex.start()) / 2.0
    c4 = math.sqrt(n) * g * eta * 0.9 / (2.0 * 0.1)
    c5 = (5 * 0.81 - 3.6 + 1.0) / (2.0 * 0.01) * n * g**2 * eta
    moved = 0.5 * (1.0 + 1 / 2 + 1 / 3 + 1 / 4)
    expected = (c3 + c5 + c4 * moved + c5 * math.log(4.0)) / (2.0 - 1.0)
    np.testing.assert_allclose(nonconvex.bound(setting, steps, g, eta), expected, rtol=1e-12)
    # With a constant radius C2 stands before T times it.
    constant = convex.bound(dataclasses.replace(setting, constant_rho=True), steps, d, g, eta)
    np.testing.assert_allclose(constant, c1 * 2.0 + c2 * 2.0, rtol=1e-12)


def test_regret_is_below_the_bound_at_every_number_of_steps() -> None:
    found = convex.regrets(convergence.CONVEX[0], 0, range(2, 60))
    for regret in found:
        assert regret.regret < regret.bound
        assert regret.distance <= 2.0 * convex.BOX
    # Below what zero weights would lose, so the comparison is of a run that learns.
    assert 0.0 < found[-1].regret < 0.5 * 59 * math.log(2.0)


def test_gradients_are_below_the_bound_at_every_number_of_steps() -> None:
    setting = convergence.NONCONVEX[-1]
    runs = [nonconvex.gradients(setting, seed, 300) for seed in range(2)]
    found = nonconvex.stationarity(setting, runs, range(2, 301))
    for at in found:
        assert at.least <= at.average < at.bound
    assert found[-1].least < 0.5 * found[8].least


def test_fused_and_eager_runs_end_in_the_same_weights() -> None:
    start = np.zeros(convex.PROBLEM.size)
    found = agreement(convex.PROBLEM, convergence.COMPARED, start, steps=200, seed=0)
    assert found.difference <= found.tolerance
    # Another gamma, off in the seventh digit, would have been noticed.
    other = dataclasses.replace(convergence.COMPARED, gamma=0.9 + 1e-7)
    ends = [
        run(convex.PROBLEM, setting, start, steps=200, seed=0).points
        for setting in (convergence.COMPARED, other)
    ]
    assert np.abs(ends[0] - ends[1]).max() > 10.0 * found.tolerance


def test_exponent_of_known_curves() -> None:
    steps = [10, 100, 300, 1000]
    curves = [[c * t**0.5 * (9.0 if t < 100 else 1.0) for t in steps] for c in (1.0, 2.0, 5.0)]
    found = exponent(steps, curves)
    assert found is not None
    np.testing.assert_allclose((found.value, found.low, found.high), 0.5, rtol=1e-9)
    assert exponent(steps, [[1.0, 2.0, 0.0, 3.0], [1.0, 2.0, 3.0, 4.0]]) is None


def test_verdicts() -> None:
    assert bound_verdict([0.1, 1.0]) == AGREES
    assert bound_verdict([0.1, 1.1]) == DISAGREES
    assert rate_verdict([True, True], bound_holds=True) == AGREES
    assert rate_verdict([True, False], bound_holds=True) == CANNOT_TELL
    assert rate_verdict([True, False], bound_holds=False) == DISAGREES


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_the_order_of_the_tasks(workers: int) -> None:
    # Not a run: the processes would import torch first, which takes longer than all else here.
    tasks = [(7, 3), (3, 7), (10, 10)]
    assert computed(operator.sub, tasks, workers, "test") == [4, -4, 0]


def test_report(tmp_path: Path) -> None:
    options = Options(size="quick", out=tmp_path)
    report = convergence.EXPERIMENT.run(options)
    verdicts = {finding.claim: finding.verdict for finding in report.findings}
    assert [claim for claim, verdict in verdicts.items() if verdict == DISAGREES] == []
    assert sum("bound" in claim or "<=" in claim for claim in verdicts) == 3
    write(convergence.EXPERIMENT, report, options, 1.0, "a command", ["convergence"])
    page = (tmp_path / "convergence.md").read_text()
    assert "gamma 0.9, constant rho" in page
    assert (tmp_path / "convergence.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    with (tmp_path / "convergence.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    at = convergence.horizons(300)
    of_convex = len(convergence.CONVEX) * 3 * len(at)
    assert len(rows) == of_convex + 2 * len(convergence.NONCONVEX) * len(at)
    # Of every setting and seed, at every number of steps.
    for row in rows:
        assert 0.0 < float(row["value"]) < float(row["bound"]), row
