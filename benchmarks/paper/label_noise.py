"""Robustness to wrong labels: WSAM paper, Tables 5 and 6."""

from __future__ import annotations

from benchmarks.paper import charts, protocol
from benchmarks.paper.comparison import (
    Claim,
    errors,
    finding,
    hyper_table,
    results_table,
    rows,
)
from benchmarks.paper.experiment import Experiment, Options, Report
from benchmarks.paper.pool import Runs
from benchmarks.paper.published import NOISY_ACCURACY

METHODS = ("SGDM", "SAM", "ESAM", "GSAM", "WSAM")
DATASETS = ("digits", "breast-cancer", "cifar10")
_SOURCE = "WSAM, Table 6"


def run(options: Options) -> Report:
    """Train on labels of which a share is drawn anew, and test on true ones."""
    runs = Runs(options)
    (dataset,) = protocol.datasets(options, small=("digits",), full=("cifar10",))
    base = protocol.task(options, dataset)
    levels = {f"{share:.0%}": share for share in NOISY_ACCURACY}
    if options.size == "quick":
        levels = {"40%": 0.4}
    own = protocol.OWN if options.size == "full" else protocol.OWN_COARSE
    specs = protocol.Search(options, runs).tuned(
        dict.fromkeys(levels, base), METHODS, own, search_base=False, label_noise=levels
    )
    results = protocol.final_runs(specs, runs, protocol.seeds(options))
    published = {
        (level, method): f"{100.0 - number[0]:.2f} ± {number[1]:g}"
        for level, share in levels.items()
        for method, number in NOISY_ACCURACY[share].items()
    }
    findings = [
        finding(item, level, results)
        for level, share in levels.items()
        for item in _claims(level, share)
    ]
    panels = {
        f"{level} of the labels drawn anew": errors(results, level, METHODS) for level in levels
    }
    figure = charts.intervals(
        panels, "top-1 error on true labels, %", f"Trained on wrong labels, {dataset}"
    )
    text = f"""
{protocol.described([base], protocol.seeds(options))} Learning rate {base.lr:g} and weight decay
{base.weight_decay:g} are the paper's; rho is searched for SAM at each level of noise, and what each
method has of its own for it alone, on validation samples with true labels. A share of the training
labels is drawn anew, uniformly over all classes, another one for every seed. The paper gives
accuracies; here are errors.

{results_table(results, published)}

Hyper-parameters found (the paper's Table 5):

{hyper_table(specs)}
"""
    return Report(
        text,
        rows(results, specs),
        figure,
        "errors of networks trained on wrong labels",
        findings,
        notes=protocol.edge_note(specs.values()),
        training=runs.seconds,
        sources=runs.sources,
    )


def _claims(level: str, share: float) -> list[Claim]:
    published = {name: 100.0 - number[0] for name, number in NOISY_ACCURACY[share].items()}
    pairs = [("SAM", "SGDM")]
    # Of the paper's means: at 80 % GSAM is the best.
    pairs += [
        ("WSAM", other) if published["WSAM"] < published[other] else (other, "WSAM")
        for other in ("SAM", "ESAM", "GSAM")
    ]
    return [
        Claim(
            _SOURCE,
            lower,
            higher,
            f"{published[lower]:.2f} against {published[higher]:.2f} ({level} noise, resnet18, "
            "cifar10)",
        )
        for lower, higher in pairs
    ]


EXPERIMENT = Experiment(
    "label-noise",
    "Test error after training on wrong labels",
    "WSAM paper, Tables 5 and 6",
    run,
    DATASETS,
)
