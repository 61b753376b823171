"""Train a small net with SGDM, SAM and WSAM, and check the fused steps against the eager ones.

Usage: ``python -m benchmarks.demo`` (about a minute on two cores); ``--method`` shows other methods
beside SGDM and SAM; ``--help`` lists the options.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks import demo_model as model
from benchmarks.arguments import whole_number
from benchmarks.demo_check import CHECKED, check
from benchmarks.demo_methods import METHODS, described
from benchmarks.demo_report import results_table, save_curves
from wsam_fused import backends

_OUT = Path(__file__).parent / "results" / "demo.png"
_BESIDE = ("SGDM", "SAM")
_EPOCHS, _QUICK_EPOCHS = 25, 4
_STEPS, _QUICK_STEPS = 20, 6
_TITLE = "Handwritten digits, small convolutional net: one run"
_CAUTION = """\
This is one run on a small data set, with hyper-parameters that nobody tuned: a demonstration that
the optimizers train, and no evidence that one of them generalizes better.
"""


def train_all(
    methods: Sequence[str], data: model.Digits, epochs: int, seed: int, backend: str
) -> list[model.History]:
    """Train with each method, behind a progress bar."""
    histories = []
    with tqdm(total=len(methods) * epochs, unit="epoch") as bar:

        def show(history: model.History) -> None:
            loss, accuracy = history.train_loss[-1], history.test_accuracy[-1]
            bar.set_description(history.method)
            bar.set_postfix(loss=f"{loss:.4f}", test=f"{accuracy:.2%}", refresh=False)
            bar.update()

        for method in methods:
            run = model.train(
                method, data, epochs=epochs, seed=seed, backend=backend, after_epoch=show
            )
            histories.append(run)
    return histories


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.demo",
        description="Train a small convolutional net on scikit-learn's handwritten digits with "
        "SGDM, SAM and another method (WSAM) at equal epochs, then check that fused and eager runs "
        "end in the same weights. Exits with 1 if they do not, with 2 on a wrong argument.",
    )
    parser.add_argument(
        "--method",
        nargs="+",
        choices=list(METHODS),
        metavar="NAME",
        help=f"train with SGDM, SAM and these: {', '.join(METHODS)} (default WSAM)",
    )
    parser.add_argument(
        "--epochs",
        type=whole_number(1, 1000),
        help=f"epochs of each method, 1 to 1000 (default {_EPOCHS}, with --quick {_QUICK_EPOCHS})",
    )
    parser.add_argument(
        "--seed",
        type=whole_number(0, 2**32 - 1),
        default=0,
        help="decides the starting weights and the order of the images, 0 to 2**32 - 1 (default 0)",
    )
    parser.add_argument(
        "--backend",
        choices=backends.names(),
        default="auto",
        help="backend for the training (default auto); the check always compares auto with eager",
    )
    parser.add_argument(
        "--out", type=Path, default=_OUT, help=f"the picture, a .png file (default {_shown(_OUT)})"
    )
    parser.add_argument("--quick", action="store_true", help="seconds: few epochs, a short check")
    parser.add_argument("--no-check", action="store_true", help="train only")
    args = parser.parse_args(argv)
    if args.out.suffix.lower() != ".png" or args.out.is_dir():
        parser.error(f"argument --out: {str(args.out)!r} is not a file name ending in .png")
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"argument --out: {str(args.out)!r} is in no folder to write to: {error}")
    try:
        backends.select(args.backend, torch.device("cpu"), torch.float32)
    except (RuntimeError, ValueError) as error:
        parser.error(f"argument --backend: {error}")
    if args.epochs is None:
        args.epochs = _QUICK_EPOCHS if args.quick else _EPOCHS
    return args


def _shown(path: Path) -> str:
    """Return the path as a user in the current directory would write it."""
    path = path.resolve()
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demonstration and return the exit status, 1 if the check failed."""
    args = _parse(argv)
    threads = torch.get_num_threads()
    # The net is too small to gain from more, and on a busy machine they wait for each other.
    torch.set_num_threads(1)
    try:
        return _run(args)
    finally:
        torch.set_num_threads(threads)


def _run(args: argparse.Namespace) -> int:
    begin = time.perf_counter()
    data = model.load()
    methods = list(dict.fromkeys([*_BESIDE, *(args.method or ["WSAM"])]))
    print(
        f"Handwritten digits, 8x8: {len(data.train_y)} images to train on, {len(data.test_y)} to "
        f"test on; batches of {model.BATCH_SIZE}, {args.epochs} epochs, seed {args.seed}.\n"
        f"{described(methods)}\n"
        f"torch {torch.__version__}, one thread.\n",
        flush=True,
    )
    histories = train_all(methods, data, args.epochs, args.seed, args.backend)
    print(f"{results_table(histories)}\n")
    print(_CAUTION)
    save_curves(histories, args.out, f"{_TITLE}, seed {args.seed}")
    print(f"Curves: {_shown(args.out)}\n", flush=True)
    steps = _QUICK_STEPS if args.quick else _STEPS
    wrong = [] if args.no_check else check(args.method or CHECKED, args.seed, steps)
    print(f"\nTook {time.perf_counter() - begin:.0f} s.", flush=True)
    if wrong:
        print("\nThe check FAILED:\n  " + "\n  ".join(wrong), file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
