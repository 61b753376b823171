"""Make many runs, several at a time, and keep what they end with.

Every finished run is a line of ``runs.csv``, written at once: a command that was stopped goes on
where it was, and experiments that have a run in common make it once.
"""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from benchmarks.common import environment, read_rows
from benchmarks.paper.data import load
from benchmarks.paper.experiment import Options
from benchmarks.paper.runs import Outcome, Spec
from benchmarks.paper.training import run

_FILE = "runs.csv"
_OUTCOME = [field.name for field in fields(Outcome)]
_SPEC = [field.name for field in fields(Spec)]
_TEXTS = [field.name for field in fields(Spec) if field.type == "str"]
_FIELDS = [*_SPEC, *_OUTCOME, "device", "torch", "source", "date"]


class Made(NamedTuple):
    """A run that was made, and the hash of the sources that it was made with."""

    outcome: Outcome
    source: str


class Runs:
    """The runs of an experiment.

    Args:
        options: Number of workers, device, folder of the results.
    """

    def __init__(self, options: Options) -> None:
        self._options = options
        self._path = options.out / _FILE
        self._known = {} if options.fresh else _read(self._path)
        self._used: dict[str, Made] = {}
        self._pool: ProcessPoolExecutor | None = None

    @property
    def seconds(self) -> float:
        """Seconds of training of all runs that were asked for, added up."""
        return sum(made.outcome.seconds for made in self._used.values())

    @property
    def sources(self) -> list[str]:
        """Hashes of the sources that these runs were made with."""
        return sorted({made.source for made in self._used.values()})

    def outcomes(self, specs: Sequence[Spec], what: str) -> list[Outcome]:
        """Return the outcomes of some runs, making those that nobody has made.

        Args:
            specs: The runs.
            what: They are for, shown at the progress bar.
        """
        missing = {spec.key(): spec for spec in specs if spec.key() not in self._known}
        if missing:
            self._make(list(missing.values()), what)
        self._used.update((spec.key(), self._known[spec.key()]) for spec in specs)
        return [self._known[spec.key()].outcome for spec in specs]

    def _make(self, specs: Sequence[Spec], what: str) -> None:
        options = self._options
        for dataset in {spec.dataset for spec in specs}:
            load(dataset, options.data)  # what is missing is better missed before processes start
        options.out.mkdir(parents=True, exist_ok=True)
        provenance = {name: environment("")[name] for name in ("device", "torch", "source", "date")}
        if options.device != "cpu":
            provenance["device"] = torch.cuda.get_device_name(options.device)

        with tqdm(total=len(specs), desc=what, unit="run", leave=False, disable=None) as bar:
            for spec, outcome in self._finished(specs):
                self._known[spec.key()] = Made(outcome, provenance["source"])
                _append(self._path, spec, outcome, provenance)
                bar.update()

    def _finished(self, specs: Sequence[Spec]) -> Iterator[tuple[Spec, Outcome]]:
        """Yield the runs as they finish."""
        options = self._options
        if options.workers == 1 or len(specs) == 1:
            threads = torch.get_num_threads()
            torch.set_num_threads(self._threads())
            try:
                for spec in specs:
                    yield spec, run(spec, options.data, options.device)
            finally:
                torch.set_num_threads(threads)
            return
        tasks = {
            self._workers().submit(run, spec, options.data, options.device): spec for spec in specs
        }
        try:
            for task in as_completed(tasks):
                yield tasks[task], task.result()
        finally:
            for task in tasks:
                task.cancel()

    def _workers(self) -> ProcessPoolExecutor:
        """Return the processes, which live as long as this object."""
        if self._pool is None:
            workers = self._options.workers
            # A forked process would share the threads of torch that the parent has started.
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(workers, context, _begin_worker, (self._threads(),))
        return self._pool

    def _threads(self) -> int:
        """Return the threads of a process; small networks only wait for a second one."""
        if self._options.size != "full":
            return 1
        return max(1, (os.cpu_count() or 1) // self._options.workers)


def _begin_worker(threads: int) -> None:
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this process when its parent is killed: nobody waits for its runs any more."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _append(path: Path, spec: Spec, outcome: Outcome, provenance: dict[str, str]) -> None:
    """Add a line; a kill leaves all of it, or a part that :func:`_read` cuts off."""
    begins = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, _FIELDS, lineterminator="\n")
        if begins:
            writer.writeheader()
        cells = {name: _cell(value) for name, value in {**asdict(spec), **asdict(outcome)}.items()}
        writer.writerow({**cells, **provenance})
        file.flush()
        os.fsync(file.fileno())


def _read(path: Path) -> dict[str, Made]:
    """Return the runs of a file by their keys; the later of two that are equal."""
    if path.exists() and not (content := path.read_bytes()).endswith(b"\n"):
        path.write_bytes(content[: content.rfind(b"\n") + 1])
    found = {}
    for row in read_rows(path):
        cells = {name: _value(row[name], name in _TEXTS) for name in (*_SPEC, *_OUTCOME)}
        cells["hyper"] = tuple((name, value) for name, value in cells["hyper"])
        spec = Spec(**{name: cells[name] for name in _SPEC})
        outcome = Outcome(**{name: cells[name] for name in _OUTCOME})
        found[spec.key()] = Made(outcome, row["source"])
    return found


def _cell(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _value(cell: str, is_text: bool) -> Any:
    return cell if is_text else json.loads(cell)
