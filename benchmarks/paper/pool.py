"""Make many runs, several at a time, and keep what they end with.

Every finished run is a line of ``runs.csv``, written at once: a command that was stopped goes on
where it was, and experiments that have a run in common make it once.
"""

from __future__ import annotations

import csv
import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.common import environment, read_rows
from benchmarks.paper.experiment import Options
from benchmarks.paper.runs import Outcome, Spec
from benchmarks.paper.training import run

_FILE = "runs.csv"
_OUTCOME = [field.name for field in fields(Outcome)]
_SPEC = [field.name for field in fields(Spec)]
_FIELDS = [*_SPEC, *_OUTCOME, "device", "torch", "source", "date"]


class Runs:
    """The runs of an experiment.

    Args:
        options: Number of workers, device, folder of the results.
    """

    def __init__(self, options: Options) -> None:
        self._options = options
        self._path = options.out / _FILE
        self._forgotten = options.fresh
        self._made: dict[str, Outcome] = {}

    def outcomes(self, specs: Sequence[Spec], what: str) -> list[Outcome]:
        """Return the outcomes of some runs, making those that nobody has made.

        Args:
            specs: The runs.
            what: They are for, shown at the progress bar.
        """
        known = self._made if self._forgotten else {**_read(self._path), **self._made}
        missing = {spec.key(): spec for spec in specs if spec.key() not in known}
        if missing:
            self._make(list(missing.values()), what)
        known = {**known, **self._made}
        return [known[spec.key()] for spec in specs]

    def _make(self, specs: Sequence[Spec], what: str) -> None:
        options = self._options
        options.out.mkdir(parents=True, exist_ok=True)
        provenance = {name: environment("")[name] for name in ("device", "torch", "source", "date")}
        if options.device != "cpu":
            provenance["device"] = torch.cuda.get_device_name(options.device)

        def note(spec: Spec, outcome: Outcome) -> None:
            self._made[spec.key()] = outcome
            _append(self._path, spec, outcome, provenance)

        with tqdm(total=len(specs), desc=what, unit="run", leave=False, disable=None) as bar:
            for spec, outcome in self._finished(specs):
                note(spec, outcome)
                bar.update()

    def _finished(self, specs: Sequence[Spec]) -> Any:
        """Yield the runs as they finish."""
        options = self._options
        if options.workers == 1 or len(specs) == 1:
            for spec in specs:
                yield spec, run(spec, options.data, options.device)
            return
        # A forked process would share the threads of torch that the parent has started.
        context = multiprocessing.get_context("spawn")
        threads = max(1, (os.cpu_count() or 1) // options.workers)
        with ProcessPoolExecutor(
            min(options.workers, len(specs)), context, _begin_worker, (threads,)
        ) as pool:
            tasks: dict[Future[Outcome], Spec] = {
                pool.submit(run, spec, options.data, options.device): spec for spec in specs
            }
            try:
                for task in as_completed(tasks):
                    yield tasks[task], task.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def _begin_worker(threads: int) -> None:
    torch.set_num_threads(threads)


def _append(path: Path, spec: Spec, outcome: Outcome, provenance: dict[str, str]) -> None:
    """Add a line, of which a kill leaves all or a part that is no line."""
    begins = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, _FIELDS, lineterminator="\n")
        if begins:
            writer.writeheader()
        row = {**_spec_cells(spec), **asdict(outcome), **provenance}
        writer.writerow(row)
        file.flush()
        os.fsync(file.fileno())
