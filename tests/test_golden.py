"""Trajectories of the authors' code (or, where there is none, of others'), on every backend.

float64 runs have to agree to 1e-10 over 20 steps; float32 runs within the tolerance recorded with
each case, which is ten times the distance between two correct codes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from differences import note
from golden_runs import CASES, TOY_CASES, label, trajectory
from problems import INDEX, array


def note_trajectory(case: dict[str, Any], backend: str, dtype: str, difference: float) -> None:
    names = {"peer": case["peer"], "case": case["name"]}
    note("trajectory", difference, of=label(case), backend=backend, dtype=dtype, **names)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_float64_trajectory_is_the_authors(case: dict[str, Any], backend: str) -> None:
    found = trajectory(case, torch.float64, backend)
    expected = array(case["name"], "w64")
    note_trajectory(case, backend, "float64", np.abs(found - expected).max())
    np.testing.assert_allclose(found, expected, rtol=0, atol=case["tol_f64"])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_float32_trajectory_is_the_authors(case: dict[str, Any], backend: str) -> None:
    found = trajectory(case, torch.float32, backend)
    difference = np.abs(found - array(case["name"], "w32")).max(axis=1)
    note_trajectory(case, backend, "float32", difference.max())
    assert (difference <= np.array(case["tol_f32"])).all(), difference


@pytest.mark.parametrize("case", TOY_CASES, ids=lambda case: case["name"])
def test_toy_trajectory_and_the_minimum_it_reaches(case: dict[str, Any], backend: str) -> None:
    found = trajectory(case, torch.float64, backend)
    compared = array(case["name"], "steps") <= case["compare_f64_up_to_step"]
    expected = array(case["name"], "w64")
    difference = np.abs(found[compared] - expected[compared]).max()
    note_trajectory(case, backend, "float64", difference)
    np.testing.assert_allclose(found[compared], expected[compared], rtol=0, atol=case["tol_f64"])
    stationary = INDEX["problems"]["toy"]["stationary_points"]
    distance = {
        name: np.linalg.norm(found[-1] - np.array(p["w"])) for name, p in stationary.items()
    }
    assert min(distance, key=lambda name: distance[name]) == case["reached"]["float64"]


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("wsam-sgdm-dec-l2-g0.88-clipNone-logit", {"method": "wsam_coupled"}),
        ("bsam-fixed-sgdm-proportional-logit", {"method": "bsam_asrun"}),
        ("gsam-sgdm-l2-a0.4-proportional-logit", {"method": "sam"}),
    ],
)
def test_a_different_method_is_told_apart(name: str, wrong: dict[str, Any]) -> None:
    """The comparison can fail."""
    case = next(case for case in CASES if case["name"] == name)
    difference = trajectory({**case, **wrong}, torch.float64, "eager") - array(name, "w64")
    assert np.abs(difference).max() > 1e-4
