"""Trajectories of the authors' code on several ranks, each of which perturbs by its own gradient.

The stored parameters are those of the authors' first rank; their replicas drift apart by rounding,
ours must not.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import ON_CPU
from golden_ranks import trajectories
from golden_runs import RANK_CASES
from problems import array
from processes import run_ranks

BACKENDS = [name for name in ON_CPU if name in ("eager", "cpu")]


@pytest.mark.parametrize("ranks", [2, 4])
def test_trajectories_are_the_authors(ranks: int) -> None:
    replicas = run_ranks(trajectories, ranks, ranks, BACKENDS)
    cases = [case for case in RANK_CASES if case["ranks"] == ranks]
    assert len(replicas[0]) == len(cases) * (len(BACKENDS) * 2 + 1)
    for case in cases:
        name = case["name"]
        expected = array(name, "w64")
        for backend in BACKENDS:
            wide, single = ((name, "local", backend, d) for d in (torch.float64, torch.float32))
            np.testing.assert_allclose(
                replicas[0][wide], expected, rtol=0, atol=case["tol_f64"], err_msg=str(wide)
            )
            difference = np.abs(replicas[0][single] - array(name, "w32")).max(axis=1)
            assert (difference <= np.array(case["tol_f32"])).all(), (single, difference)
            for other in replicas[1:]:
                for key in (wide, single):
                    np.testing.assert_array_equal(other[key], replicas[0][key], err_msg=str(key))
        # The comparison can fail: a perturbation by the mean gradient is told apart.
        control = replicas[0][name, "global", BACKENDS[0], torch.float64]
        assert np.abs(control - expected).max() > 1e-6, name
