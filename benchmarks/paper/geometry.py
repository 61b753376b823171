"""Shapes of the neighbourhood: WSAM paper, Table 7."""

from __future__ import annotations

import itertools

from benchmarks.paper import charts, protocol
from benchmarks.paper.comparison import Claim, errors, finding, hyper_table, results_table, rows
from benchmarks.paper.experiment import Experiment, Options, Report
from benchmarks.paper.pool import Runs
from benchmarks.paper.published import GEOMETRY_ERROR, printed
from benchmarks.paper.runs import Spec

METHODS = ("SAM", "WSAM")
DATASETS = ("digits", "breast-cancer", "cifar10", "cifar100")
_SOURCE = "WSAM, Table 7"
# WSAM paper, section 6.4.
_GAMMAS = (0.80, 0.82, 0.84, 0.86, 0.88, 0.90, 0.92, 0.94)


def run(options: Options) -> Report:
    """Search radius and gamma for each geometry, and compare."""
    runs = Runs(options)
    (dataset,) = protocol.datasets(options, small=("digits",), full=("cifar10",))
    base = protocol.task(options, dataset)
    specs = _searched(base, protocol.Search(options, runs))
    results = protocol.final_runs(specs, runs, protocol.seeds(options))
    published = {
        (geometry, method): printed(number)
        for geometry, numbers in GEOMETRY_ERROR.items()
        for method, number in numbers.items()
    }
    # A finding's two sides are of one group; here they are of several.
    across = {
        (dataset, f"{method} {geometry}"): outcomes
        for (geometry, method), outcomes in results.items()
    }
    findings = [finding(item, dataset, across) for item in _claims()]
    panels = {geometry: errors(results, geometry, METHODS) for geometry in GEOMETRY_ERROR}
    figure = charts.intervals(
        panels, "top-1 error on the test set, %", f"Geometries of the neighbourhood, {dataset}"
    )
    text = f"""
{protocol.described([base], protocol.seeds(options))} Learning rate {base.lr:g} and weight decay
{base.weight_decay:g}. The radius is searched for SAM in each geometry (in
{protocol.WIDE_RHOS} for the adaptive and the Fisher one), then gamma in
{_GAMMAS}, on validation samples. "adaptive" is ASAM's, |w| for every parameter; "fisher" is
1 / (1 + eta g^2) with eta 1, the third-party form that docs/methods.md describes: the paper's own
"+Fisher" has no public code.

{results_table(results, published)}

Hyper-parameters found:

{hyper_table(specs)}
"""
    return Report(
        text,
        rows(results, specs),
        figure,
        "errors of SAM and WSAM in three geometries",
        findings,
        notes=protocol.edge_note(specs.values()),
        training=runs.seconds,
        sources=runs.sources,
    )


def _searched(base: protocol.Task, search: protocol.Search) -> dict[tuple[str, str], Spec]:
    best = search.best(
        {
            geometry: [
                base.spec("SAM", rho=rho, geometry=geometry) for rho in protocol.radii(geometry)
            ]
            for geometry in GEOMETRY_ERROR
        }
    )
    candidates: dict[tuple[str, str], list[Spec]] = {}
    for geometry, method in itertools.product(GEOMETRY_ERROR, METHODS):
        hyper = dict(best[geometry].hyper)
        candidates[geometry, method] = [
            base.spec(method, **hyper, **own)
            for own in ([{}] if method == "SAM" else [{"gamma": gamma} for gamma in _GAMMAS])
        ]
    return search.best(candidates)


def _claims() -> list[Claim]:
    """Return the paper's order: of the geometries for each method, and of the methods in each."""
    pairs = (
        (("WSAM", "euclidean"), ("SAM", "euclidean")),
        (("SAM", "adaptive"), ("SAM", "euclidean")),
        (("WSAM", "euclidean"), ("WSAM", "adaptive")),
        (("SAM", "euclidean"), ("SAM", "fisher")),
        (("WSAM", "euclidean"), ("WSAM", "fisher")),
    )
    return [
        Claim(
            _SOURCE,
            " ".join(lower),
            " ".join(higher),
            f"{printed(GEOMETRY_ERROR[lower[1]][lower[0]])} against "
            f"{printed(GEOMETRY_ERROR[higher[1]][higher[0]])} (wrn28-10, cifar10)",
        )
        for lower, higher in pairs
    ]


EXPERIMENT = Experiment(
    "geometry",
    "Geometries of the neighbourhood",
    "WSAM paper, Table 7",
    run,
    DATASETS,
)
