"""Measure WSAM steps on a GPU and write one JSON and one Markdown file.

    python -m benchmarks.bench_gpu [--budget SECONDS] [--shapes ...] [--no-compile] ...
    python -m benchmarks.bench_gpu --device cpu --quick     a dry run of the same code, no GPU

Cases come in the order of their importance, and none is started when the budget is spent: it then
says so in the table. The files are written again after every step of the way. A run with the same
sources, device and software goes on where the files in the folder end.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch

from benchmarks import gpu_table
from benchmarks.common import GPU, QUICK, RESULTS, shapes_of, spread
from benchmarks.contenders import BASES, GPU_CONTENDERS, Ours, OursCuda, OursTriton
from benchmarks.gpu import captured
from benchmarks.gpu.case import DTYPES, Case, plan
from benchmarks.gpu.clock import Clock, CopyBuffer
from benchmarks.gpu.machine import describe
from benchmarks.gpu.measure import (
    COMPILED,
    Bench,
    measure_compiled,
    measure_launches,
    measure_times,
)
from benchmarks.gpu.parity import disagreeing
from benchmarks.gpu.record import Record

_COPIES = 30
_CAPTURED_SHAPES = ("2000x64", "gpt2-small")
_CAPTURE_LIMIT_S = 90.0
_LEFT_OUT = "left out by --no-compile"


class Budget:
    """The time that there is.

    Args:
        seconds: From now on.
    """

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def has(self, seconds: float = 0.0) -> bool:
        """Whether more than ``seconds`` are left."""
        return self._end - time.monotonic() > seconds


def run(options: argparse.Namespace, command: str) -> tuple[Path, bool]:
    """Measure everything that fits into the budget.

    Args:
        options: The command line.
        command: The same as text.

    Returns:
        The JSON file, and whether nothing failed.
    """
    budget = Budget(options.budget)
    device = torch.device(options.device)
    clock = Clock(device)
    on_gpu = device.type == "cuda"
    ours = OursCuda.name if on_gpu else Ours.name
    names = [name for name in GPU_CONTENDERS if not on_gpu or name != Ours.name]
    cases = plan(options.shapes, options.bases, options.dtypes)
    graphs = [case for case in cases if _is_captured(case)]
    header = {**describe(device, command), **_copy_bandwidth(clock)}
    record = Record(header, cases, names, graphs, ours)
    record.carry_over(options.out)
    cases.sort(key=record.is_open, reverse=True)
    bench = Bench(device, clock, record, options.rounds, options.warmup, ours)
    able = _able(bench, cases, names, options.no_compile)

    def save() -> Path:
        path = record.write(options.out)
        path.with_suffix(".md").write_text(gpu_table.render(gpu_table.read(path)))
        return path

    save()
    timed = [name for name in able if name != COMPILED]
    for case in _within(budget, cases):
        _guarded(bench, case, partial(measure_times, bench, case, timed))
        save()
    if on_gpu:
        for case in _within(budget, cases):
            _guarded(bench, case, partial(measure_launches, bench, case, timed))
            save()
    for case in _within(budget, graphs):
        _guarded(bench, case, partial(_capture, bench, case, able))
        save()
    if COMPILED in able and budget.has(options.compile_limit):
        beside = [ours] if ours in able else []
        _compile(bench, cases, options.compile_limit, beside, budget, save)
    return save(), not record.has_failures()


def _is_captured(case: Case) -> bool:
    return case.shapes in _CAPTURED_SHAPES and case.base == "AdamW" and case.dtype == "float32"


def _copy_bandwidth(clock: Clock) -> dict[str, object]:
    copy = CopyBuffer(clock)
    # spread() names its cells after milliseconds, which these are not.
    found = spread(copy.rates(_COPIES))
    rates = {key.removesuffix("_ms"): value for key, value in found.items()}
    return {"copy_gb_per_s": rates, "copy_bytes": copy.moved}


def _able(bench: Bench, cases: Sequence[Case], names: Sequence[str], no_compile: bool) -> list[str]:
    """Return who can be measured; the rows of the others say why not."""
    reasons = {name: GPU_CONTENDERS[name].unavailable() for name in names}
    if not bench.on_gpu:
        for name in (OursCuda.name, OursTriton.name):
            reasons[name] = reasons[name] or f"steps no parameters on {bench.device.type}"
    if no_compile:
        reasons[COMPILED] = _LEFT_OUT
    # The compiled one is compared when its turn comes, which takes long.
    compared = [name for name, reason in reasons.items() if reason is None and name != COMPILED]
    reasons.update(disagreeing(compared, bench.device))
    for name, reason in reasons.items():
        for case in cases:
            measured_before = reason == _LEFT_OUT and not bench.record.row(case, name)["note"]
            if reason is not None and not measured_before:
                bench.record.fill(case, name, {"note": reason})
    return [name for name in names if reasons[name] is None]


def _within(budget: Budget, cases: Sequence[Case]) -> Iterator[Case]:
    """Yield the cases that are begun in time."""
    for case in cases:
        if not budget.has():
            return
        print(f"{time.strftime('%H:%M:%S')} {case}", file=sys.stderr, flush=True)
        yield case


def _guarded(bench: Bench, case: Case, action: Callable[[], None]) -> None:
    """Go on with the next case whatever happens in this one."""
    try:
        action()
    except Exception as error:
        traceback.print_exc()
        bench.record.add_problem(f"{case}: {type(error).__name__}: {error}")


def _capture(bench: Bench, case: Case, able: Sequence[str]) -> None:
    found = {"note": bench.record.row(case, OursCuda.name)["note"]}
    if OursCuda.name in able:
        bench.clock.free_bytes()  # gives torch's cache back, for the other process
        found = captured.in_a_process(case, bench.rounds, _CAPTURE_LIMIT_S)
    bench.record.fill_captured(case, found)


def _compile(
    bench: Bench,
    cases: Sequence[Case],
    limit_s: float,
    beside: Sequence[str],
    budget: Budget,
    save: Callable[[], Path],
) -> None:
    reason = disagreeing([COMPILED], bench.device).get(COMPILED)
    torch.compiler.reset()  # a case must not count as a recompilation of that
    for case in cases:
        if reason is not None:
            bench.record.fill(case, COMPILED, {"note": reason})
        elif budget.has(limit_s):
            print(f"{time.strftime('%H:%M:%S')} {case}, compiled", file=sys.stderr, flush=True)
            _guarded(bench, case, partial(measure_compiled, bench, case, limit_s, beside))
            save()


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--device", default="cuda", choices=["cuda", "cpu"], help="cpu for a dry run (cuda)")
    add("--quick", action="store_true", help="small shapes and few rounds: does it work at all?")
    add("--budget", type=float, default=400.0, help="seconds until no case is started (400)")
    add("--shapes", nargs="+", metavar="LIST", help=f"e.g. {', '.join(GPU)}")
    add("--bases", nargs="+", default=list(BASES), choices=list(BASES))
    add("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    add("--rounds", type=int, help="that count (20, quick: 3)")
    add("--warmup", type=int, default=3, help="steps before, that do not count (3)")
    add("--no-compile", action="store_true", help="leave torch.compile out")
    add("--compile-limit", type=float, default=60.0, help="seconds for it per case (60)")
    add("--out", type=Path, default=RESULTS, help="folder of the results and of the stages'")
    options = parser.parse_args(arguments)
    options.shapes = options.shapes or list(QUICK if options.quick else GPU)
    options.rounds = options.rounds or (3 if options.quick else 20)
    for name in options.shapes:
        try:
            shapes_of(name)
        except ValueError as error:
            parser.error(str(error))
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device is cuda, but there is no CUDA device; expected cpu, a dry run")
    if options.device == "cpu" and options.out == RESULTS:
        parser.error("--device is cpu, which is a dry run: --out must be another folder")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and print the table."""
    options = parse(arguments)
    given = sys.argv[1:] if arguments is None else arguments
    # An end from outside is an exit like others, so that the processes started here end, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("error: ended from outside"))
    with tempfile.TemporaryDirectory() as cache:
        # Empty at first, so that the seconds of a compilation are those of a first one.
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        path, good = run(options, " ".join(["python -m benchmarks.bench_gpu", *given]))
    print(path.with_suffix(".md").read_text())
    if not good:
        raise SystemExit("error: something failed; the table says what")


if __name__ == "__main__":
    main()
