"""Test errors of all methods: WSAM paper, Tables 2 and 3."""

from __future__ import annotations

from benchmarks.paper import charts, protocol
from benchmarks.paper.comparison import (
    Claim,
    claim,
    errors,
    finding,
    hyper_table,
    results_table,
    rows,
)
from benchmarks.paper.experiment import Experiment, Options, Report
from benchmarks.paper.pool import Runs
from benchmarks.paper.published import ERROR, printed

METHODS = ("SGDM", "SAM", "ESAM", "GSAM", "WSAM", "BSAM", "RW-SAM")
DATASETS = ("digits", "breast-cancer", "cifar10", "cifar100")
# Few differ by more than the seeds do: twice as many as elsewhere.
_SEEDS = 20
_SOURCE = "WSAM, Table 2"
_NOTES = """
The claims about BSAM and RW-SAM are those of abstracts: we hold neither paper's protocol. Both have
SAM's rho here, and a short grid of ours for what else they have.
"""
_BSAM, _RWSAM = "Bilateral SAM, abstract", "RW-SAM, abstract"


def run(options: Options) -> Report:
    """Search hyper-parameters, train with all methods, and compare."""
    runs = Runs(options)
    names = protocol.datasets(
        options, small=("digits", "breast-cancer"), full=("cifar10", "cifar100")
    )
    tasks = {name: protocol.task(options, name) for name in names}
    specs = protocol.Search(options, runs).tuned(tasks, METHODS, protocol.OWN)
    results = protocol.final_runs(specs, runs, protocol.seeds(options, _SEEDS))
    published = {
        (name, method): printed(number)
        for name in names
        for method, number in ERROR.get((tasks[name].model, name), {}).items()
    }
    findings = [
        finding(item, name, results)
        for name in names
        for item in _claims(*protocol.paper_case(tasks[name]))
    ]
    panels = {name: errors(results, name, METHODS) for name in names}
    figure = charts.intervals(panels, "top-1 error on the test set, %", "Error of all methods")
    text = f"""
{protocol.described(tasks.values(), protocol.seeds(options, _SEEDS))} Learning rate, weight decay,
rho and what each method has of its own are searched for as in section 6.1 of the paper, on
validation samples.

{results_table(results, published)}

Hyper-parameters found (the paper's Table 3):

{hyper_table(specs)}
"""
    return Report(
        text,
        rows(results, specs),
        figure,
        "test errors of all methods",
        findings,
        notes=_NOTES + protocol.edge_note(specs.values()),
        training=runs.seconds,
        sources=runs.sources,
    )


def _claims(model: str, dataset: str) -> list[Claim]:
    """Return what the papers claim, with the numbers of one model and data set."""
    published, where = ERROR[model, dataset], f"{model}, {dataset}"
    pairs = (("SAM", "SGDM"), ("WSAM", "SAM"), ("WSAM", "ESAM"), ("WSAM", "GSAM"))
    return [
        *(claim(_SOURCE, lower, higher, published, where) for lower, higher in pairs),
        Claim(_BSAM, "BSAM", "SAM", "superior to SAM; no numbers in the abstract"),
        Claim(_RWSAM, "RW-SAM", "SAM", "more accurate than SAM; no numbers in the abstract"),
    ]


EXPERIMENT = Experiment(
    "accuracy",
    "Test error of all methods",
    "WSAM paper, Tables 2 and 3; with BSAM and RW-SAM",
    run,
    DATASETS,
)
