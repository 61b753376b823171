"""The protocol of the papers' comparisons: grids of hyper-parameters, and how the best are found.

WSAM paper, section 6.1: learning rate and weight decay are searched for momentum SGD and kept for
all; rho is searched for SAM and kept for all; what a method has besides, it is searched for alone.
We choose by the accuracy on validation samples, which are neither trained nor tested on, over seeds
that the final runs do not have; the paper does not say what it chose by.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.paper.data import DATASETS
from benchmarks.paper.experiment import Options, WrongArgument
from benchmarks.paper.methods import METHODS
from benchmarks.paper.networks import NETWORKS
from benchmarks.paper.pool import Runs
from benchmarks.paper.runs import Outcome, Spec

Grid = Mapping[str, Sequence[Any]]

LEARNING_RATES = (0.05, 0.1)
WEIGHT_DECAYS = (1e-4, 5e-4, 1e-3)
# Of the Euclidean geometry (section 6.1), and of the adaptive and Fisher's (section 6.4).
RHOS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
WIDE_RHOS = (0.1, 0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0)
# WSAM paper, section 6.1. BSAM's and RW-SAM's are ours: we hold neither paper's grid.
OWN: dict[str, Grid] = {
    "SGDM": {},
    "SAM": {},
    "ESAM": {"beta": (0.4, 0.5, 0.6), "gamma": (0.4, 0.5, 0.6)},
    "GSAM": {"alpha": (0.01, 0.02, 0.03, 0.1, 0.2, 0.3)},
    "WSAM": {"gamma": (0.5, 0.6, 0.7, 0.8, 0.82, 0.84, 0.86, 0.88, 0.9, 0.92, 0.94, 0.96)},
    "Coupled-WSAM": {"gamma": (0.5, 0.6, 0.7, 0.8, 0.82, 0.84, 0.86, 0.88, 0.9, 0.92, 0.94, 0.96)},
    "BSAM": {"rho_min": (0.01, 0.02, 0.05, 0.1)},
    "RW-SAM": {"lam": (0.1, 0.3, 1.0), "delta": (1e-3,)},
}
# Of the same ranges, for what has to be searched many times on a small machine.
OWN_COARSE: dict[str, Grid] = {
    "ESAM": {"beta": (0.5, 0.6), "gamma": (0.5, 0.6)},
    "GSAM": {"alpha": (0.01, 0.1, 0.3)},
    "WSAM": {"gamma": (0.8, 0.88, 0.91, 0.93)},
}

_SEARCH_SEED = 1000


@dataclass(frozen=True)
class Task:
    """What a data set is trained with.

    Attributes:
        dataset: Its name.
        model: Name of the network.
        epochs: Of a SAM-like run.
        batch_size: Samples of a mini-batch.
        lr: Learning rate that is not searched for.
        weight_decay: Likewise.
    """

    dataset: str
    model: str
    epochs: int
    batch_size: int
    lr: float = 0.05
    weight_decay: float = 1e-3

    def spec(self, method: str, seed: int = 0, **hyper: Any) -> Spec:
        """Return a run; SGDM has twice the epochs (WSAM paper, section 6.1)."""
        epochs = self.epochs * (2 if METHODS[method].vanilla else 1)
        base = Spec(
            self.dataset,
            self.model,
            method,
            (),
            self.lr,
            self.weight_decay,
            epochs,
            self.batch_size,
            seed,
        )
        return base.given(**hyper)


_TASKS = {
    "digits": Task("digits", "resnet-small", 30, 50),
    "breast-cancer": Task("breast-cancer", "resnet-tabular", 40, 20),
    "cifar10": Task("cifar10", "resnet18", 200, 128),
    "cifar100": Task("cifar100", "resnet18", 200, 128),
}
_WIDE_BATCH, _WIDE_LR = 256, 0.1
_QUICK_EPOCHS = 2


def task(options: Options, dataset: str) -> Task:
    """Return what a data set is trained with, as the options have it.

    Raises:
        WrongArgument: The model does not take the data set.
    """
    found = _TASKS[dataset]
    if options.model is not None:
        takes = [model for model in NETWORKS if _is_tabular(model) == _is_tabular(found.model)]
        if options.model not in takes:
            raise WrongArgument(
                f"argument --model: {options.model!r} cannot take {dataset}, expected one of "
                f"{', '.join(takes)}"
            )
        found = replace(found, model=options.model)
    if found.model == "wrn28-10":
        found = replace(found, batch_size=_WIDE_BATCH, lr=_WIDE_LR)
    if options.size == "quick":
        found = replace(found, epochs=_QUICK_EPOCHS)
    if options.epochs is not None:
        found = replace(found, epochs=options.epochs)
    return found


def _is_tabular(model: str) -> bool:
    return model == "resnet-tabular"


def datasets(options: Options, *, small: Sequence[str], full: Sequence[str]) -> Sequence[str]:
    """Return the data sets of an experiment.

    Args:
        options: May name one.
        small: Those of the default size; a quick one has the fastest.
        full: Those of the paper.
    """
    if options.dataset is not None:
        return (options.dataset,)
    return options.of_size(quick=("breast-cancer",), default=small, full=full)


def points(grid: Grid) -> list[dict[str, Any]]:
    """Return all combinations of a grid."""
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


class Search:
    """Finds hyper-parameters on validation samples.

    Args:
        options: Decide the number of seeds; a quick search takes one and the ends of every grid.
        runs: Makes the runs.
    """

    def __init__(self, options: Options, runs: Runs) -> None:
        self._options = options
        self._runs = runs
        self._seeds = options.of_size(quick=1, default=3, full=2)

    def best(self, candidates: Mapping[str, Sequence[Spec]]) -> dict[str, Spec]:
        """Return the best of some runs, for each of several questions at once.

        The best has the highest mean accuracy over the seeds; of equal ones, the lowest mean loss.

        Args:
            candidates: For every question its runs, which differ in hyper-parameters.
        """
        if self._options.size == "quick":
            candidates = {key: [specs[0], specs[-1]] for key, specs in candidates.items()}
        seeds = range(_SEARCH_SEED, _SEARCH_SEED + self._seeds)
        every = {
            key: [[replace(spec, seed=seed) for seed in seeds] for spec in specs]
            for key, specs in candidates.items()
            if len(specs) > 1
        }
        flat = [spec for specs in every.values() for same in specs for spec in same]
        found = iter(self._runs.outcomes(flat, "search"))
        best = {key: specs[0] for key, specs in candidates.items()}
        for key, specs in every.items():
            scores = [_score([next(found) for _ in same]) for same in specs]
            # The runs of the final table have seeds of their own.
            best[key] = replace(specs[scores.index(max(scores))][0], seed=0)
        return best

    def tuned(
        self,
        base: Mapping[str, Task],
        methods: Sequence[str],
        own: Mapping[str, Grid],
        *,
        search_base: bool = True,
        label_noise: Mapping[str, float] | None = None,
    ) -> dict[tuple[str, str], Spec]:
        """Return every method's best run for several tasks, after the WSAM paper's protocol.

        Args:
            base: The tasks by name.
            methods: Their names; SGDM and SAM are searched for in any case.
            own: The grid of what each method has besides rho.
            search_base: Search learning rate and weight decay; else they are the task's.
            label_noise: Share of the labels drawn anew, by name of the task.

        Returns:
            By name of the task and method, with seed 0.
        """
        noise = label_noise or {}

        def spec(name: str, method: str, **hyper: Any) -> Spec:
            return replace(base[name].spec(method, **hyper), label_noise=noise.get(name, 0.0))

        if search_base:
            pairs = list(itertools.product(LEARNING_RATES, WEIGHT_DECAYS))
            found = self.best(
                {
                    name: [replace(spec(name, "SGDM"), lr=lr, weight_decay=wd) for lr, wd in pairs]
                    for name in base
                }
            )
            base = {
                name: replace(base[name], lr=best.lr, weight_decay=best.weight_decay)
                for name, best in found.items()
            }
        found = self.best({name: [spec(name, "SAM", rho=rho) for rho in RHOS] for name in base})
        rho = {name: dict(best.hyper)["rho"] for name, best in found.items()}
        candidates: dict[tuple[str, str], list[Spec]] = {}
        for name, method in itertools.product(base, methods):
            radius = {} if METHODS[method].vanilla else {"rho": rho[name]}
            candidates[name, method] = [
                spec(name, method, **radius, **point) for point in points(own.get(method, {}))
            ]
        return self.best(candidates)


def _score(outcomes: Sequence[Outcome]) -> tuple[float, float]:
    accuracy = statistics.mean(outcome.validation_accuracy for outcome in outcomes)
    return accuracy, -statistics.mean(outcome.validation_loss for outcome in outcomes)


def final_runs(specs: Mapping[Any, Spec], runs: Runs, seeds: int) -> dict[Any, list[Outcome]]:
    """Return the outcomes of some runs for the seeds 0 to ``seeds`` - 1."""
    every = [replace(spec, seed=seed) for spec in specs.values() for seed in range(seeds)]
    found = iter(runs.outcomes(every, "final runs"))
    return {key: [next(found) for _ in range(seeds)] for key in specs}


def seeds(options: Options, default: int = 10) -> int:
    """Return the number of seeds of the final runs; the papers have five.

    Args:
        options: May give a number.
        default: For the default size.
    """
    return options.seeds or int(options.of_size(quick=2, default=default, full=5))


def paper_case(found: Task) -> tuple[str, str]:
    """Return the model and data set of the paper whose numbers stand beside a task's."""
    if found.dataset in ("cifar10", "cifar100") and found.model in ("resnet18", "wrn28-10"):
        return found.model, found.dataset
    return "resnet18", "cifar10"


def described(tasks: Iterable[Task], seeds: int) -> str:
    """Return in words what is trained, and how long."""
    parts = [
        f"{DATASETS[found.dataset]} on {found.model}, batches of {found.batch_size}, "
        f"{found.epochs} epochs (SGDM {2 * found.epochs})"
        for found in tasks
    ]
    return (
        f"{'; '.join(parts)}. Momentum SGD is the base, its learning rate falls to 0 as a cosine; "
        f"{seeds} seeds, mean ± standard deviation."
    )


def radii(geometry: str) -> Sequence[float]:
    """Return the papers' range of rho for a geometry."""
    return RHOS if geometry == "euclidean" else WIDE_RHOS


def edge_note(specs: Iterable[Spec]) -> str:
    """Return a sentence if a search ended at the largest radius that it had; else nothing."""
    chosen = [dict(spec.hyper) for spec in specs if spec.method == "SAM"]
    ends = [hyper["rho"] == radii(hyper.get("geometry", "euclidean"))[-1] for hyper in chosen]
    if not any(ends):
        return ""
    return (
        "Where rho is the largest of its range, a larger one might have done better on networks as "
        "small as these; the ranges are the paper's, and were not widened."
    )
