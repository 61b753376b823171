"""Make an experiment of the papers, or list them.

Usage: ``python -m benchmarks.paper [NAME] [options]``; ``--help`` lists the options.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.arguments import whole_number
from benchmarks.paper.catalog import EXPERIMENTS
from benchmarks.paper.data import DATASETS
from benchmarks.paper.experiment import OUT, Options, WrongArgument
from benchmarks.paper.networks import NETWORKS
from benchmarks.paper.report import write


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.paper",
        description="Make an experiment of the papers and write what it found (CSV, PNG, Markdown) "
        "and the overview README.md. Without a name: list the experiments. A command that was "
        "stopped goes on where it was.",
    )
    parser.add_argument("name", nargs="?", choices=[*EXPERIMENTS, "all"], metavar="NAME")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--full", action="store_true", help="the papers' sizes: CIFAR, a GPU, days")
    size.add_argument("--quick", action="store_true", help="seconds: shows only that it works")
    parser.add_argument("--seeds", type=whole_number(2, 1000), help="of every final run, 2 to 1000")
    parser.add_argument(
        "--epochs",
        type=whole_number(1, 10000),
        help="of a SAM-like run; plain SGD has twice as many",
    )
    parser.add_argument("--dataset", choices=list(DATASETS), help=f"one of {', '.join(DATASETS)}")
    parser.add_argument("--model", choices=list(NETWORKS), help=f"one of {', '.join(NETWORKS)}")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="folder with the CIFAR files")
    parser.add_argument("--device", default="cpu", help="of the training (default cpu)")
    parser.add_argument(
        "--workers",
        type=whole_number(1, 256),
        help="processes that train at the same time (default: the cores; on a GPU and quick: 1)",
    )
    parser.add_argument("--fresh", action="store_true", help="forget what earlier calls computed")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the results")
    return parser


def _options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> Options:
    try:
        device = torch.device(args.device)
        torch.empty(0, device=device)
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        parser.error(f"argument --device: {args.device!r} cannot be used here: {error}")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return Options(
        size="full" if args.full else "quick" if args.quick else "default",
        seeds=args.seeds,
        epochs=args.epochs,
        dataset=args.dataset,
        model=args.model,
        data=args.data,
        device=args.device,
        workers=args.workers or (1 if device.type != "cpu" or args.quick else cores or 1),
        fresh=args.fresh,
        out=args.out,
    )


def _list() -> None:
    width = max(map(len, EXPERIMENTS))
    for name, experiment in EXPERIMENTS.items():
        print(f"{name:{width}}  {experiment.title} ({experiment.source})")
    print(f"{'all':{width}}  all of these, one after the other")


def main(argv: Sequence[str] | None = None) -> int:
    """Make an experiment; return the exit status, 2 for a wrong argument."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.name is None:
        _list()
        return 0
    options = _options(parser, args)
    for name in EXPERIMENTS if args.name == "all" else [args.name]:
        experiment = EXPERIMENTS[name]
        if options.dataset is not None and options.dataset not in experiment.datasets:
            allowed = ", ".join(experiment.datasets) or "no data set"
            parser.error(f"argument --dataset: {options.dataset!r}; {name} takes {allowed}")
        begin = time.perf_counter()
        try:
            report = experiment.run(options)
        except (FileNotFoundError, WrongArgument) as error:
            parser.error(str(error))
        seconds = time.perf_counter() - begin
        path = write(experiment, report, options, seconds, _command(name, argv), list(EXPERIMENTS))
        for finding in report.findings:
            print(f"{finding.source}: {finding.found}: {finding.verdict}")
        print(f"Written: {path} and beside it, in {seconds:.0f} s.", flush=True)
    return 0


def _command(name: str, argv: Sequence[str] | None) -> str:
    """Return the command as a user would write it again."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    rest = [argument for argument in arguments if argument not in (name, "all", "--fresh")]
    return " ".join(["python -m benchmarks.paper", name, *rest])


if __name__ == "__main__":
    sys.exit(main())
