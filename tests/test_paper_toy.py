"""The toy example of the WSAM paper: its loss, its minima, who ends in which, and the report."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from problems import INDEX, Problem

pytest.importorskip("scipy", reason="the minima are found with scipy")
pytest.importorskip("matplotlib", reason="the report has a picture")
pytest.importorskip("tqdm", reason="the experiment shows a progress bar")

from benchmarks.paper import toy
from benchmarks.paper.experiment import AGREES, DISAGREES, Options
from benchmarks.paper.report import write
from benchmarks.paper.toy import loss as toy_loss
from benchmarks.paper.toy import paths as toy_paths

_KNOWN = INDEX["problems"]["toy"]["stationary_points"]
_CONTENDERS = {contender.name: contender for contender in toy_paths.CONTENDERS}
# The table of what these optimizers do, found with the authors' code.
_ENDS = {
    "SAM": ("toy-sam", "sharp"),
    "WSAM 0.6": ("toy-wsam-dec-g0.6", "sharp"),
    "Coupled-WSAM 0.6": ("toy-wsam-coup-g0.6", "sharp"),
    "WSAM 0.95": ("toy-wsam-dec-g0.95", "sharp"),
    "Coupled-WSAM 0.95": ("toy-wsam-coup-g0.95", "flat"),
}


@pytest.mark.parametrize("point", [(-6.0, 10.0), (-17.0, 12.5), (19.0, 31.0), (3.0, 40.0)])
def test_loss_and_gradient_are_those_of_the_golden_problem(point: tuple[float, float]) -> None:
    problem = Problem("toy", torch.float64)
    with torch.no_grad():
        problem.params[0].copy_(torch.tensor(point, dtype=torch.float64))
    loss = problem.loss(1)
    loss.backward()
    # A few dozen roundings each; the terms of the gradient cancel where a component is near.
    np.testing.assert_allclose(toy_loss.loss(*point), loss.item(), rtol=1e-14)
    expected = problem.params[0].grad
    np.testing.assert_allclose(toy_loss.gradient(*point), expected, rtol=1e-12, atol=1e-16)


def test_loss_is_computed_in_the_dtype_of_the_point() -> None:
    point = np.array([-6.0, 10.0], np.float32)
    assert toy_loss.loss(point[0], point[1]).dtype == np.float32
    assert all(part.dtype == np.float32 for part in toy_loss.gradient(point[0], point[1]))


@pytest.mark.parametrize("name", [toy_loss.SHARP, toy_loss.FLAT])
def test_minima_are_the_known_ones(name: str) -> None:
    found, known = toy_loss.minima()[name], _KNOWN[name]
    # A descent in float64 stops where the loss no longer changes: at a distance whose square times
    # half the curvature is u of the loss, sqrt(2 u 0.3 / 3e-4) = 5e-7.
    np.testing.assert_allclose((found.mu, found.sigma), known["w"], rtol=0, atol=5e-7)
    np.testing.assert_allclose(found.loss, known["loss"], rtol=1e-14)
    np.testing.assert_allclose(found.eigenvalues, known["hessian_eigenvalues"], rtol=1e-7)


def test_basins_are_told_apart() -> None:
    saddle = np.array(_KNOWN["saddle"]["w"])
    towards_flat = (np.array(_KNOWN["flat"]["w"]) - saddle) * 0.05
    assert toy_loss.basin(*(saddle + towards_flat)) == toy_loss.FLAT
    assert toy_loss.basin(*(saddle - towards_flat)) == toy_loss.SHARP
    # The gradient is zero there, and the descent stays.
    assert toy_loss.basin(*saddle) == toy_loss.NEITHER


def test_contenders_are_the_known_ones() -> None:
    assert list(_CONTENDERS) == list(_ENDS)


@pytest.mark.parametrize("name", _ENDS)
def test_every_optimizer_ends_where_the_authors_code_does(name: str) -> None:
    case_name, basin = _ENDS[name]
    case = next(case for case in INDEX["cases"] if case["name"] == case_name)
    fused = toy_paths.path(_CONTENDERS[name])
    eager = toy_paths.path(_CONTENDERS[name], backend="eager")
    assert toy_loss.basin(*fused[-1]) == toy_loss.basin(*eager[-1]) == basin
    assert case["reached"]["float64"] == basin
    comparable = case["compare_f64_up_to_step"] + 1
    np.testing.assert_allclose(fused[:comparable], eager[:comparable], rtol=0, atol=case["tol_f64"])


def test_float32_is_float32() -> None:
    contender = _CONTENDERS["Coupled-WSAM 0.95"]
    path = toy_paths.path(contender, dtype=torch.float32)
    assert path.dtype == np.float32
    assert toy_loss.basin(*path[-1].tolist()) == toy_loss.FLAT


def test_jittered_starts_are_near_and_always_the_same() -> None:
    starts = np.array(toy_paths.jittered_starts(40))
    assert starts.shape == (40, 2)
    assert 0.4 < np.abs(starts - toy_paths.START).max() <= 0.5
    np.testing.assert_array_equal(starts[:5], toy_paths.jittered_starts(5))


def test_report(tmp_path: Path) -> None:
    options = Options(size="quick", out=tmp_path)
    report = toy.EXPERIMENT.run(options)
    verdicts = [finding.verdict for finding in report.findings]
    # The minima, SAM, gamma = 0.6 decoupled and coupled, gamma = 0.95 decoupled and coupled.
    assert verdicts == [AGREES, AGREES, AGREES, AGREES, DISAGREES, AGREES]
    assert "Algorithm 4" in report.notes
    page = write(toy.EXPERIMENT, report, options, 1.0, "a command", ["toy"])
    assert "| WSAM 0.95 " in page.read_text()
    assert (tmp_path / "toy.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    with (tmp_path / "toy.csv").open(newline="") as file:
        rows = {row["optimizer"]: row for row in csv.DictReader(file)}
    assert {name: row["minimum"] for name, row in rows.items()} == {
        name: basin for name, (_, basin) in _ENDS.items()
    }
    for name, row in rows.items():
        assert row[f"jittered_{_ENDS[name][1]}"] == "5"
        assert row["float32"] == row["300_steps"] == f"{_ENDS[name][1]} 1/1"
        # 20 steps that each round numbers of 20 a few times, in either backend.
        assert float(row["fused_minus_eager"]) < 1e-12
