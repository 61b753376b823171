"""What the minima are like: WSAM paper, Table 9, and the gradient noise of the RW-SAM paper."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from benchmarks.demo_report import table
from benchmarks.paper import charts, protocol
from benchmarks.paper.comparison import lower_finding, summary
from benchmarks.paper.experiment import Experiment, Finding, Options, Report
from benchmarks.paper.minimum import SHARPNESS_RHO
from benchmarks.paper.pool import Runs
from benchmarks.paper.published import MINIMA
from benchmarks.paper.runs import Outcome
from benchmarks.paper.statistics import mean_and_deviation

METHODS = ("SGDM", "SAM", "WSAM", "RW-SAM")
DATASETS = ("digits", "breast-cancer", "cifar10", "cifar100")
_SOURCE = "WSAM, Table 9"
_NOISE_SOURCE = "RW-SAM, abstract"

_NOTES = """
To read with care: where a network fits every training sample, the cross entropy, its Hessian and
the gradients of the samples all go to 0 together as training goes on, in any method. SGDM has twice
the epochs, and so is further down; a larger eigenvalue or noise at a larger loss does not say that
a method found a sharper valley. The paper's networks end at losses of the same order, but with
eigenvalues hundreds of times larger.
"""

_MEASURES: dict[str, Callable[[Outcome], float]] = {
    "training loss x 1000": lambda outcome: 1000.0 * outcome.train_loss,
    "error, %": lambda outcome: outcome.test_error,
    "largest Hessian eigenvalue": lambda outcome: outcome.hessian_max_eigenvalue or 0.0,
    "sharpness x 1000": lambda outcome: 1000.0 * (outcome.sharpness or 0.0),
    "gradient noise x 1000": lambda outcome: 1000.0 * (outcome.gradient_noise_trace or 0.0),
}


def run(options: Options) -> Report:
    """Train, and measure loss, curvature, sharpness and gradient noise where that ends."""
    runs = Runs(options)
    (dataset,) = protocol.datasets(options, small=("digits",), full=("cifar10",))
    base = protocol.task(options, dataset)
    tuned = protocol.Search(options, runs).tuned({dataset: base}, METHODS, protocol.OWN)
    specs = {method: replace(tuned[dataset, method], minimum=True) for method in METHODS}
    results = protocol.final_runs(specs, runs, protocol.seeds(options))
    values = {
        name: {method: [measure(o) for o in results[method]] for method in METHODS}
        for name, measure in _MEASURES.items()
    }
    cells = [
        (
            method,
            *(mean_and_deviation(values[name][method]) for name in _MEASURES),
            _published(method),
        )
        for method in METHODS
    ]
    text = f"""
{protocol.described([base], protocol.seeds(options))} Hyper-parameters as in
[accuracy](accuracy.md). All in evaluation mode over the training set, without weight decay: the
Hessian's largest eigenvalue by Lanczos' method (`wsam_fused.landscape`, scipy), sharpness
L(w + e) - L(w) for rho {SHARPNESS_RHO:g}, and the gradient noise: the trace of the covariance of
the samples' gradients.

{table(("method", *_MEASURES, "the paper's loss, error, eigenvalue"), cells)}
"""
    rows = [
        {"method": method, "measure": name, **summary(values[name][method])}
        for name in _MEASURES
        for method in METHODS
    ]
    figure = charts.intervals(values, "", f"Where training ends, {dataset}")
    return Report(
        text,
        rows,
        figure,
        "loss, error, curvature, sharpness and gradient noise of minima",
        _findings(values, dataset),
        notes=_NOTES,
        training=runs.seconds,
        sources=runs.sources,
    )


def _published(method: str) -> str:
    if method not in MINIMA:
        return "-"
    loss, accuracy, eigenvalue = MINIMA[method]
    return f"{loss:g}, {100.0 - accuracy:.2f}, {eigenvalue:g}"


def _findings(values: Mapping[str, Mapping[str, Sequence[float]]], dataset: str) -> list[Finding]:
    loss, curvature, noise = (
        values[name]
        for name in (
            "training loss x 1000",
            "largest Hessian eigenvalue",
            "gradient noise x 1000",
        )
    )
    losses = {method: 1000.0 * numbers[0] for method, numbers in MINIMA.items()}
    eigenvalues = {method: numbers[2] for method, numbers in MINIMA.items()}
    questions = [
        ("loss x 1000", loss, losses, "SGDM", "SAM"),
        ("loss x 1000", loss, losses, "WSAM", "SAM"),
        ("eigenvalue", curvature, eigenvalues, "SAM", "SGDM"),
        ("eigenvalue", curvature, eigenvalues, "WSAM", "SGDM"),
    ]
    found = [
        lower_finding(
            _SOURCE,
            f"{what} {lower} < {higher}: {paper[lower]:g} against {paper[higher]:g} "
            "(resnet18, cifar10)",
            dataset,
            here[lower],
            here[higher],
        )
        for what, here, paper, lower, higher in questions
    ]
    found += [
        lower_finding(
            _NOISE_SOURCE,
            "noise in the perturbation regularizes the variance of the gradients (no numbers in "
            f"the abstract; we take: gradient noise x 1000 {method} < SGDM at the end)",
            dataset,
            noise[method],
            noise["SGDM"],
        )
        for method in ("SAM", "RW-SAM")
    ]
    return found


EXPERIMENT = Experiment(
    "minima",
    "Loss, curvature and gradient noise where training ends",
    "WSAM paper, Table 9; RW-SAM paper",
    run,
    DATASETS,
)
