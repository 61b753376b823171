"""Trajectories of the authors' code (and of the widely used SAM port), on every backend.

float64 runs have to agree to 1e-10 over 20 steps; float32 runs within the tolerance recorded with
each case, which is ten times the distance between two correct codes.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from problems import INDEX, Problem, array

from wsam_fused import SAM, WSAM

BASES = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
CASES = [case for case in INDEX["cases"] if case["problem"] != "toy"]
TOY_CASES = [case for case in INDEX["cases"] if case["problem"] == "toy"]


def make_optimizer(case: dict[str, Any], problem: Problem, backend: str) -> torch.optim.Optimizer:
    hyper, base = case["hyper"], case["base"]
    options: dict[str, Any] = {
        "rho": hyper["rho"],
        "adaptive": hyper.get("adaptive", False),
        "max_grad_norm": hyper.get("max_norm"),
        "eps": hyper.get("eps", 1e-12),
        "backend": backend,
    }
    params: list[Any] = list(problem.params)
    if "groups" in case:
        own = [{k: v for k, v in group.items() if k != "tensors"} for group in case["groups"]]
        params = [
            {**rest, "params": [problem.params[i] for i in group["tensors"]]}
            for rest, group in zip(own, case["groups"], strict=True)
        ]
    bound = functools.partial(BASES[base["name"]], **base["kwargs"])
    if case["method"] == "sam":
        return SAM(params, bound, **options)
    return WSAM(params, bound, gamma=hyper["gamma"], decouple=hyper["decouple"], **options)


def trajectory(case: dict[str, Any], dtype: torch.dtype, backend: str) -> np.ndarray:
    """Run the case and return the parameters after the recorded steps."""
    problem = Problem(case["problem"], dtype)
    optimizer = make_optimizer(case, problem, backend)
    steps = array(case["name"], "steps")
    lr, rho = array(case["name"], "lr"), array(case["name"], "rho")
    found = []
    for step in range(1, int(steps[-1]) + 1):
        for i, group in enumerate(optimizer.param_groups):
            group["lr"] = float(np.atleast_1d(lr[step - 1])[i if lr.ndim > 1 else 0])
            group["rho"] = float(np.atleast_1d(rho[step - 1])[i if rho.ndim > 1 else 0])

        def closure(step: int = step) -> torch.Tensor:
            optimizer.zero_grad()
            loss = problem.loss(step)
            loss.backward()
            return loss

        optimizer.step(closure)
        if step in steps:
            found.append(problem.flat().numpy().copy())
    return np.stack(found)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_float64_trajectory_is_the_authors(case: dict[str, Any], backend: str) -> None:
    found = trajectory(case, torch.float64, backend)
    np.testing.assert_allclose(found, array(case["name"], "w64"), rtol=0, atol=case["tol_f64"])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_float32_trajectory_is_the_authors(case: dict[str, Any], backend: str) -> None:
    found = trajectory(case, torch.float32, backend)
    difference = np.abs(found - array(case["name"], "w32")).max(axis=1)
    assert (difference <= np.array(case["tol_f32"])).all(), difference


@pytest.mark.parametrize("case", TOY_CASES, ids=lambda case: case["name"])
def test_toy_trajectory_and_the_minimum_it_reaches(case: dict[str, Any], backend: str) -> None:
    found = trajectory(case, torch.float64, backend)
    compared = array(case["name"], "steps") <= case["compare_f64_up_to_step"]
    expected = array(case["name"], "w64")
    np.testing.assert_allclose(found[compared], expected[compared], rtol=0, atol=case["tol_f64"])
    stationary = INDEX["problems"]["toy"]["stationary_points"]
    distance = {
        name: np.linalg.norm(found[-1] - np.array(p["w"])) for name, p in stationary.items()
    }
    assert min(distance, key=lambda name: distance[name]) == case["reached"]["float64"]


def test_a_different_method_is_told_apart() -> None:
    """The comparison can fail: coupled WSAM does not pass for decoupled WSAM."""
    case = next(c for c in CASES if c["name"] == "wsam-sgdm-dec-l2-g0.88-clipNone-logit")
    wrong = {**case, "hyper": {**case["hyper"], "decouple": False}}
    difference = np.abs(trajectory(wrong, torch.float64, "eager") - array(case["name"], "w64"))
    assert difference.max() > 1e-3
