"""Training a trained network further: WSAM paper, Table 4."""

from __future__ import annotations

import statistics
from dataclasses import replace

from benchmarks.demo_report import table
from benchmarks.paper import charts, protocol
from benchmarks.paper.comparison import errors, lower_finding, rows
from benchmarks.paper.experiment import Experiment, Finding, Options, Report
from benchmarks.paper.methods import METHODS as KNOWN
from benchmarks.paper.pool import Runs
from benchmarks.paper.published import FINETUNED_ERROR, printed
from benchmarks.paper.runs import Spec
from benchmarks.paper.statistics import alike, mean_and_deviation

METHODS = ("SGDM", "SAM", "GSAM", "WSAM")
DATASETS = ("digits", "breast-cancer", "cifar10", "cifar100")
_SOURCE = "WSAM, Table 4"
_EPOCHS = 3
_WEIGHT_DECAY = 1e-4
# The paper has 1e-5 for DeiT on ImageNet, whose three epochs are 15,000 steps; here they are 24.
_LEARNING_RATES = (1e-4, 1e-3, 1e-2)
_RADII = (0.05, 0.1, 0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0)
_OWN: dict[str, protocol.Grid] = {
    "GSAM": {"alpha": (0.01, 0.02, 0.03, 0.1, 0.2, 0.3)},
    "WSAM": {"gamma": tuple(round(0.80 + 0.02 * i, 2) for i in range(10))},
}
# The paper's "no significant differences" has no number; its three errors are equal to 0.01.
_MARGIN = 0.1


def run(options: Options) -> Report:
    """Train a network with SGDM, then each method for three more epochs on the same data."""
    runs = Runs(options)
    (dataset,) = protocol.datasets(options, small=("digits",), full=("cifar10",))
    base = protocol.task(options, dataset)
    specs = _searched(base, protocol.Search(options, runs))
    results = protocol.final_runs(
        {(dataset, method): spec for method, spec in specs.items()}, runs, protocol.seeds(options)
    )
    found = errors(results, dataset, METHODS)
    # A run with a learning rate of 0 has the weights that all others start from.
    untouched = replace(specs["SGDM"], lr=0.0, weight_decay=0.0)
    (initial,) = runs.outcomes([untouched], "initial")
    cells = [("initial", f"{initial.test_error:.2f}", "18.2", "-")]
    cells += [
        (
            method,
            mean_and_deviation(found[method]),
            printed(FINETUNED_ERROR[method]),
            ", ".join(f"{name} {value}" for name, value in specs[method].hyper) or "-",
        )
        for method in METHODS
    ]
    text = f"""
{dataset}: a {base.model} trained here with SGDM for {2 * base.epochs} epochs, then {_EPOCHS} more
with each method on the same data (weight decay {_WEIGHT_DECAY:g}, learning rate
{specs["SGDM"].lr:g} of {_LEARNING_RATES}, falling to 0 as a cosine; {protocol.seeds(options)} seeds
of the order of the samples). The paper's model is DeiT-Base on ImageNet. Learning rate, rho and
what each method has of its own are searched for on validation samples.

{table(("method", "error, %", "the paper's, %", "own"), cells)}
"""
    figure = charts.intervals(
        {f"{dataset}, {initial.test_error:.2f} % before": found},
        "top-1 error on the test set, %",
        "Three more epochs",
    )
    return Report(
        text,
        rows(results, {(dataset, method): spec for method, spec in specs.items()}),
        figure,
        "errors after three more epochs with each method",
        _findings(dataset, found),
        training=runs.seconds,
        sources=runs.sources,
    )


def _searched(base: protocol.Task, search: protocol.Search) -> dict[str, Spec]:
    def spec(method: str, lr: float, **hyper: object) -> Spec:
        return replace(
            base.spec(method, **hyper),
            lr=lr,
            weight_decay=_WEIGHT_DECAY,
            epochs=_EPOCHS,
            pretrained=2 * base.epochs,
        )

    lr = search.best({"": [spec("SGDM", lr) for lr in _LEARNING_RATES]})[""].lr
    rho = dict(search.best({"": [spec("SAM", lr, rho=rho) for rho in _RADII]})[""].hyper)["rho"]
    return search.best(
        {
            method: [
                spec(method, lr, **({} if KNOWN[method].vanilla else {"rho": rho}), **point)
                for point in protocol.points(_OWN.get(method, {}))
            ]
            for method in METHODS
        }
    )


def _findings(dataset: str, values: dict[str, list[float]]) -> list[Finding]:
    found = [
        lower_finding(
            _SOURCE,
            f"error {method} < SGDM: {printed(FINETUNED_ERROR[method])} against "
            f"{printed(FINETUNED_ERROR['SGDM'])} (DeiT-Base, ImageNet)",
            dataset,
            values[method],
            values["SGDM"],
        )
        for method in METHODS[1:]
    ]
    margin = _MARGIN * statistics.mean(values["SAM"])
    verdict, interval = alike(values["WSAM"], values["SAM"], margin)
    found.append(
        Finding(
            _SOURCE,
            "no significant difference between SAM, GSAM and WSAM (no number; we take: WSAM is "
            f"within {_MARGIN:.0%} of SAM's error)",
            f"{dataset}: difference {interval}, within ± {margin:.2f} asked",
            verdict,
        )
    )
    return found


EXPERIMENT = Experiment(
    "finetune",
    "Three more epochs for a trained network",
    "WSAM paper, Table 4",
    run,
    DATASETS,
)
