"""Fused and eager training of one seed end in the same weights."""

from __future__ import annotations

from dataclasses import replace

import torch
from matplotlib.figure import Figure
from torch import nn
from tqdm import tqdm

from benchmarks.demo_check import difference, nudge
from benchmarks.demo_report import table
from benchmarks.paper import charts, protocol
from benchmarks.paper.experiment import AGREES, DISAGREES, Experiment, Finding, Options, Report
from benchmarks.paper.runs import Spec
from benchmarks.paper.training import fresh_network, prepared, train_network

DATASETS = ("digits", "breast-cancer", "cifar10", "cifar100")
HYPER: dict[str, dict[str, float]] = {
    "SAM": {"rho": 0.1},
    "ESAM": {"rho": 0.1, "beta": 0.5, "gamma": 0.5},
    "GSAM": {"rho": 0.1, "alpha": 0.1},
    "WSAM": {"rho": 0.1, "gamma": 0.88},
    "Coupled-WSAM": {"rho": 0.1, "gamma": 0.88},
    "BSAM": {"rho": 0.1, "rho_min": 0.05},
    "RW-SAM": {"rho": 0.1, "lam": 0.3, "delta": 1e-3},
    "m-SAM": {"rho": 0.1, "m": 10},
    "n-SAM": {"rho": 0.1},
}


def run(options: Options) -> Report:
    """Train with every method on the fused and on the eager backend, and compare the weights."""
    (dataset,) = protocol.datasets(options, small=("digits",), full=("cifar10",))
    base = protocol.task(options, dataset)
    methods = list(HYPER) if options.size != "quick" else ["SAM", "WSAM", "m-SAM"]
    found = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for method in tqdm(methods, desc="methods", unit="method", leave=False, disable=None):
            spec = replace(base.spec(method, **HYPER[method]), dtype="float64")
            found[method] = _compare(spec, options)
    finally:
        torch.set_num_threads(threads)
    steps = base.epochs * (
        len(prepared(base.spec("SAM"), options.data, options.device).train.y) // base.batch_size
    )
    bounds = {method: steps * grown for method, (_, grown) in found.items()}
    cells = [
        (
            method,
            f"{apart:.1e}",
            f"{grown:.1e}",
            f"{bounds[method]:.1e}",
            "same" if apart <= bounds[method] else "DIFFERENT",
        )
        for method, (apart, grown) in found.items()
    ]
    text = f"""
{dataset} on {base.model}, float64, one seed, {base.epochs} epochs, {steps} steps: the same training
on the fused backend and on the eager reference. Differences are max |a - b| / max |b| of each
tensor of weights, the largest of all. Training amplifies rounding: an eager run that starts off by
one rounding per weight ends off by what the third column says, and each of the {steps} steps may
add one.

{table(("method", "fused - eager", "off by one rounding", "allowed", "ends"), cells)}
"""
    same = [method for method, (apart, _) in found.items() if apart <= bounds[method]]
    different = [method for method in found if method not in same]
    findings = [
        Finding(
            "wsam_fused",
            "fused and eager training of one seed end in the same weights, within rounding",
            f"{dataset}: {', '.join(same)} the same"
            + (f"; {', '.join(different)} DIFFERENT" if different else ""),
            DISAGREES if different else AGREES,
        )
    ]
    rows = [
        {"method": method, "apart": apart, "off_by_one_rounding": grown, "allowed": bounds[method]}
        for method, (apart, grown) in found.items()
    ]
    return Report(text, rows, _picture(found, bounds), "differences and bounds", findings)


def _compare(spec: Spec, options: Options) -> tuple[float, float]:
    """Return how far fused and eager end apart, and eager from eager off by one rounding."""
    eager = replace(spec, backend="eager")
    reference = _end(eager, options)
    apart = difference(_end(spec, options), reference)
    off = difference(_end(eager, options, nudged=True), reference)
    return apart, max(off, torch.finfo(torch.float64).eps)


def _end(spec: Spec, options: Options, *, nudged: bool = False) -> list[torch.Tensor]:
    data = prepared(spec, options.data, options.device)
    net: nn.Module = fresh_network(spec, data, spec.seed, options.device)
    if nudged:
        nudge(net.parameters())
    train_network(net, spec, data)
    return [param.detach() for param in net.parameters()]


def _picture(found: dict[str, tuple[float, float]], bounds: dict[str, float]) -> Figure:
    figure = Figure(figsize=(7.0, 1.4 + 0.35 * len(found)), dpi=130, layout="constrained")
    axes = figure.subplots()
    places = range(len(found))
    axes.scatter([apart or 1e-17 for apart, _ in found.values()], places, label="fused - eager")
    axes.scatter(list(bounds.values()), places, marker="|", s=120, color="#d55e00", label="allowed")
    axes.set_xscale("log")
    axes.set_yticks(places, list(found))
    axes.invert_yaxis()
    axes.set_xlabel("largest relative difference of the weights after training")
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=2)
    charts.plain(axes)
    return figure


EXPERIMENT = Experiment(
    "agreement",
    "Fused and eager training end in the same weights",
    "wsam_fused",
    run,
    DATASETS,
)
