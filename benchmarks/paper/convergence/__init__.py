"""Regret and gradients of SGD with WSAM beside their bounds: WSAM paper, section 5.1."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from threadpoolctl import threadpool_limits

from benchmarks.paper.convergence import convex, nonconvex
from benchmarks.paper.convergence.agreement import agreement
from benchmarks.paper.convergence.outcomes import ConvexOutcome, NonconvexOutcome
from benchmarks.paper.convergence.parallel import computed
from benchmarks.paper.convergence.picture import draw
from benchmarks.paper.convergence.report import (
    curves_of_gradients,
    curves_of_regrets,
    findings,
    notes,
    rows,
    text,
)
from benchmarks.paper.convergence.sgd_with_wsam import Setting
from benchmarks.paper.experiment import Experiment, Options, Report

# alpha = 1, where the printed C1 and that of the proof are the same; the rest shows what batch,
# radius and learning rate do to it.
CONVEX = (
    Setting(gamma=0.5, box=convex.BOX),
    Setting(gamma=0.8, box=convex.BOX),
    Setting(gamma=0.9, box=convex.BOX),
    Setting(gamma=0.9, batch=1, box=convex.BOX),
    Setting(gamma=0.9, alpha=0.1, box=convex.BOX),
    Setting(gamma=0.9, constant_rho=True, box=convex.BOX),
)
NONCONVEX = (Setting(gamma=0.5), Setting(gamma=0.9))

# Of these the one whose weights of gradients are the largest, so that rounding shows most.
COMPARED = CONVEX[2]

_PER_DECADE = 6
_FEWEST_STEPS = 10
# Eager steps take several times as long.
_COMPARED_STEPS = 1000


def horizons(steps: int) -> list[int]:
    """Return the numbers of steps to report at, evenly on a logarithmic scale, up to ``steps``.

    Args:
        steps: Length of the runs, >= 10.
    """
    back = np.arange(_PER_DECADE * np.log10(steps / _FEWEST_STEPS) + 1e-9)
    return sorted({round(steps * 10.0 ** (-k / _PER_DECADE)) for k in back.tolist()})


def _convex(seeds: range, at: Sequence[int], workers: int) -> list[ConvexOutcome]:
    tasks = [(setting, seed, at) for setting in CONVEX for seed in seeds]
    results = iter(computed(convex.regrets, tasks, workers, "convex"))
    return [ConvexOutcome(setting, [next(results) for _ in seeds]) for setting in CONVEX]


def _nonconvex(seeds: range, at: Sequence[int], workers: int) -> list[NonconvexOutcome]:
    tasks = [(setting, seed, at[-1]) for setting in NONCONVEX for seed in seeds]
    results = iter(computed(nonconvex.gradients, tasks, workers, "not convex"))
    outcomes = []
    for setting in NONCONVEX:
        runs = [next(results) for _ in seeds]
        outcomes.append(NonconvexOutcome(setting, runs, nonconvex.stationarity(setting, runs, at)))
    return outcomes


def run(options: Options) -> Report:
    """Run Algorithm 3 on both problems and compare what it does with the theorems."""
    at = horizons(options.of_size(quick=300, default=10_000, full=100_000))
    seeds = range(options.seeds or options.of_size(quick=3, default=5, full=10))
    convexes = _convex(seeds, at, options.workers)
    nonconvexes = _nonconvex(seeds, at, options.workers)
    with threadpool_limits(1):
        compared = agreement(
            convex.PROBLEM,
            COMPARED,
            np.zeros(convex.PROBLEM.size),
            steps=min(at[-1], _COMPARED_STEPS),
            seed=0,
        )
    return Report(
        text=text(convexes, nonconvexes, compared),
        rows=rows(convexes, nonconvexes),
        figure=draw(curves_of_regrets(convexes), curves_of_gradients(nonconvexes)),
        caption="Regret and least squared gradient of SGD with WSAM over the steps, with bounds",
        findings=findings(convexes, nonconvexes),
        notes=notes(convexes, nonconvexes),
    )


EXPERIMENT = Experiment(
    name="convergence",
    title="Convergence: regret and gradients beside the bounds",
    source="WSAM, Theorems 5.1 and 5.3, Corollaries 5.2 and 5.4",
    run=run,
)
