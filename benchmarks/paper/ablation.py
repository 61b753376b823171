"""What decoupling the sharpness term does: WSAM paper, Table 8."""

from __future__ import annotations

from benchmarks.paper import charts, protocol
from benchmarks.paper.comparison import claim, errors, finding, hyper_table, results_table, rows
from benchmarks.paper.experiment import Experiment, Options, Report
from benchmarks.paper.pool import Runs
from benchmarks.paper.published import COUPLED, ERROR, printed

METHODS = ("SAM", "Coupled-WSAM", "WSAM")
DATASETS = ("digits", "breast-cancer", "cifar10", "cifar100")
# Few differ by more than the seeds do: twice as many as elsewhere.
_SEEDS = 20
_SOURCE = "WSAM, Table 8"


def run(options: Options) -> Report:
    """Compare WSAM with its coupled form and with SAM, each with its own gamma."""
    runs = Runs(options)
    names = protocol.datasets(
        options, small=("digits", "breast-cancer"), full=("cifar10", "cifar100")
    )
    tasks = {name: protocol.task(options, name) for name in names}
    specs = protocol.Search(options, runs).tuned(tasks, METHODS, protocol.OWN)
    results = protocol.final_runs(specs, runs, protocol.seeds(options, _SEEDS))
    findings, published = [], {}
    for name in names:
        case = protocol.paper_case(tasks[name])
        numbers = {**ERROR[case], "Coupled-WSAM": COUPLED[case]}
        where = ", ".join(case)
        findings += [
            finding(claim(_SOURCE, lower, higher, numbers, where), name, results)
            for lower, higher in (
                ("Coupled-WSAM", "SAM"),
                ("WSAM", "SAM"),
                # Of the means that the paper prints, the lower one first.
                sorted(("WSAM", "Coupled-WSAM"), key=numbers.__getitem__),
            )
        ]
        if case[1] == name:
            published.update({(name, m): printed(numbers[m]) for m in METHODS})
    panels = {name: errors(results, name, METHODS) for name in names}
    figure = charts.intervals(
        panels, "top-1 error on the test set, %", "WSAM, its coupled form, and SAM"
    )
    text = f"""
{protocol.described(tasks.values(), protocol.seeds(options, _SEEDS))} Hyper-parameters as in
[accuracy](accuracy.md), whose runs these are; the coupled form has a gamma of its own.

{results_table(results, published)}

{hyper_table(specs)}
"""
    return Report(
        text,
        rows(results, specs),
        figure,
        "errors of SAM, Coupled-WSAM and WSAM",
        findings,
        notes="Coupled-WSAM with gamma 0.5 is SAM: where the search finds that, both have the same "
        "errors but for rounding.",
        training=runs.seconds,
        sources=runs.sources,
    )


EXPERIMENT = Experiment(
    "ablation",
    "Decoupled and coupled WSAM",
    "WSAM paper, Table 8",
    run,
    DATASETS,
)
