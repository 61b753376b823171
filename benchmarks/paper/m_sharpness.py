"""How many samples perturb together: n-SAM, mini-batch SAM, m-SAM and RW-SAM."""

from __future__ import annotations

import itertools
import statistics
from dataclasses import replace

from benchmarks.demo_report import table
from benchmarks.paper import charts, protocol
from benchmarks.paper.comparison import error, lower_finding, summary
from benchmarks.paper.data import load
from benchmarks.paper.experiment import Experiment, Finding, Options, Report
from benchmarks.paper.pool import Runs
from benchmarks.paper.statistics import half_width, mean_and_deviation

DATASETS = ("digits", "breast-cancer", "cifar10", "cifar100")
_SOURCE = "RW-SAM, abstract"


def run(options: Options) -> Report:
    """Train with perturbations by the gradient of ever fewer samples."""
    runs = Runs(options)
    (dataset,) = protocol.datasets(options, small=("digits",), full=("cifar10",))
    base = protocol.task(options, dataset)
    tuned = protocol.Search(options, runs).tuned({dataset: base}, ("SAM", "RW-SAM"), protocol.OWN)
    sam = tuned[dataset, "SAM"]
    divisors = options.of_size(quick=(2,), default=(2, 5, 10), full=(2, 4, 8))
    sizes = [base.batch_size // divisor for divisor in divisors]
    samples = len(load(dataset, options.data).train.y)
    specs = {f"n-SAM ({samples})": replace(sam, method="n-SAM"), f"SAM ({base.batch_size})": sam}
    specs |= {f"m-SAM ({m})": replace(sam, method="m-SAM").given(m=m) for m in sizes}
    specs["RW-SAM"] = tuned[dataset, "RW-SAM"]
    results = protocol.final_runs(specs, runs, protocol.seeds(options))
    errors = {name: [error(o) for o in outcomes] for name, outcomes in results.items()}
    cells = [
        (
            name,
            mean_and_deviation(errors[name]),
            f"± {half_width(errors[name]):.2f}",
            f"{statistics.mean(o.seconds for o in results[name]):.1f}",
        )
        for name in specs
    ]
    text = f"""
{protocol.described([base], protocol.seeds(options))} In brackets: the samples whose gradient gives
a perturbation. n-SAM perturbs by the gradient of the whole training set and updates with that of
the mini-batch; SAM perturbs by the mini-batch; m-SAM cuts it into micro-batches that are perturbed
each by its own gradient. Learning rate, weight decay and rho {dict(sam.hyper)["rho"]:g} are SAM's
of [accuracy](accuracy.md) for all, so that only the number of samples differs; RW-SAM has its own
lambda.

{table(("method", "error, %", "95 % of the mean", "s per run"), cells)}
"""
    figure = charts.intervals(
        {dataset: errors}, "top-1 error on the test set, %", "Samples that perturb together"
    )
    rows = [{"method": name, **summary(values)} for name, values in errors.items()]
    return Report(
        text,
        rows,
        figure,
        "errors by the number of samples that perturb together",
        _findings(dataset, errors),
        training=runs.seconds,
        sources=runs.sources,
    )


def _findings(dataset: str, errors: dict[str, list[float]]) -> list[Finding]:
    """Compare neighbours in the order of m, the ends, and RW-SAM with SAM."""
    ordered = [name for name in errors if name != "RW-SAM"]
    pairs = [
        *((smaller, larger) for larger, smaller in itertools.pairwise(ordered)),
        (ordered[-1], ordered[0]),
        ("RW-SAM", ordered[1]),
    ]
    general = "the fewer samples perturb together, the better"
    reweighted = "RW-SAM generalizes like m-SAM, better than SAM"
    return [
        lower_finding(
            _SOURCE,
            f"{reweighted if lower == 'RW-SAM' else general}: error {lower} < {higher} "
            "(no numbers in the abstract)",
            dataset,
            errors[lower],
            errors[higher],
        )
        for lower, higher in pairs
    ]


EXPERIMENT = Experiment(
    "m-sharpness",
    "Samples that perturb together",
    "RW-SAM paper; SAM paper, section 4.1",
    run,
    DATASETS,
)
