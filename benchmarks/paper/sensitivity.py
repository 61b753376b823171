"""How much gamma matters: WSAM paper, Fig. 3."""

from __future__ import annotations

import statistics

from benchmarks.demo_report import table
from benchmarks.paper import charts, protocol
from benchmarks.paper.comparison import error, summary
from benchmarks.paper.experiment import (
    AGREES,
    CANNOT_TELL,
    DISAGREES,
    Experiment,
    Finding,
    Options,
    Report,
)
from benchmarks.paper.pool import Runs
from benchmarks.paper.statistics import alike, difference, mean_and_deviation

DATASETS = ("digits", "breast-cancer", "cifar10", "cifar100")
_SOURCE = "WSAM, Figure 3"
_GAMMAS = protocol.OWN["WSAM"]["gamma"]
# "Not sensitive" has no number in the paper; of its figure's axis we take a tenth of the error.
_MARGIN = 0.1
_BEST = (0.8, 0.95)


def run(options: Options) -> Report:
    """Train with WSAM for each gamma, all else as SAM has it."""
    runs = Runs(options)
    names = protocol.datasets(
        options, small=("digits", "breast-cancer"), full=("cifar10", "cifar100")
    )
    tasks = {name: protocol.task(options, name) for name in names}
    tuned = protocol.Search(options, runs).tuned(tasks, ("SAM",), {})
    gammas = options.of_size(quick=(0.5, 0.9), default=_GAMMAS, full=_GAMMAS)
    specs = {}
    for name in names:
        sam = tuned[name, "SAM"]
        task = protocol.Task(
            sam.dataset, sam.model, sam.epochs, sam.batch_size, sam.lr, sam.weight_decay
        )
        for gamma in gammas:
            specs[name, gamma] = task.spec("WSAM", gamma=gamma, **dict(sam.hyper))
    results = protocol.final_runs(specs, runs, protocol.seeds(options))
    errors = {
        name: {gamma: [error(o) for o in results[name, gamma]] for gamma in gammas}
        for name in names
    }
    cells = [
        (f"{gamma:g}", *(mean_and_deviation(errors[name][gamma]) for name in names))
        for gamma in gammas
    ]
    text = f"""
{protocol.described(tasks.values(), protocol.seeds(options))} Learning rate, weight decay and rho
are SAM's of [accuracy](accuracy.md). gamma 0.5 over plain SGD would be SAM; over momentum it is
not, since the sharpness term is decoupled.

{table(("gamma", *(f"error on {name}, %" for name in names)), cells)}
"""
    rows = [
        {"dataset": name, "gamma": gamma, **summary(errors[name][gamma])}
        for name in names
        for gamma in gammas
    ]
    figure = charts.curves(
        {name: {"WSAM": errors[name]} for name in names},
        "gamma",
        "top-1 error on the test set, %",
        "Sensitivity of WSAM to gamma (mean over seeds, 95 % interval)",
    )
    findings = [finding for name in names for finding in _findings(name, errors[name])]
    return Report(
        text,
        rows,
        figure,
        "error of WSAM by gamma",
        findings,
        training=runs.seconds,
        sources=runs.sources,
    )


def _findings(name: str, errors: dict[float, list[float]]) -> list[Finding]:
    means = {gamma: statistics.mean(values) for gamma, values in errors.items()}
    best, worst = min(means, key=means.__getitem__), max(means, key=means.__getitem__)
    margin = _MARGIN * means[best]
    verdict, interval = alike(errors[worst], errors[best], margin)
    flat = Finding(
        _SOURCE,
        "WSAM is not sensitive to gamma (no number; we take: the worst mean error of the sweep is "
        f"within {_MARGIN:.0%} of the best)",
        f"{name}: {means[best]:.2f} % at gamma {best:g}, {means[worst]:.2f} % at {worst:g}, "
        f"difference {interval}, within ± {margin:.2f} asked",
        verdict,
    )
    # Whether the best lies in the range: against the best of those outside.
    inside = [gamma for gamma in means if _BEST[0] <= gamma <= _BEST[1]]
    outside = [gamma for gamma in means if gamma not in inside]
    good, other = (min(part, key=means.__getitem__) for part in (inside, outside))
    apart = difference(errors[good], errors[other])
    where = AGREES if apart.high < 0 else DISAGREES if apart.low > 0 else CANNOT_TELL
    place = Finding(
        _SOURCE,
        "the best gamma is almost always between 0.8 and 0.95",
        f"{name}: best inside {means[good]:.2f} % at {good:g}, best outside {means[other]:.2f} % "
        f"at {other:g}, difference {apart}",
        where,
    )
    return [flat, place]


EXPERIMENT = Experiment(
    "sensitivity",
    "Sensitivity of WSAM to gamma",
    "WSAM paper, Figure 3",
    run,
    DATASETS,
)
