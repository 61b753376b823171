"""What an experiment is given, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.common import RESULTS

OUT = RESULTS / "paper"

AGREES = "agrees"
DISAGREES = "disagrees"
CANNOT_TELL = "cannot tell at this size"


class WrongArgument(ValueError):
    """An argument of the command line does not go with the experiment; the message says which."""


@dataclass(frozen=True)
class Options:
    """How large an experiment is made, and where it writes.

    Attributes:
        size: ``"default"`` (minutes on two cores), ``"quick"`` (seconds, shows nothing but that
            everything works) or ``"full"`` (the papers' sizes).
        seeds: Seeds of every final run, None for the experiment's own number.
        epochs: Epochs of a SAM-like run, None for the data set's own number.
        dataset: None for the experiment's own.
        model: None for the data set's own.
        data: Folder with the CIFAR files.
        device: Of the training.
        workers: Processes that train at the same time.
        fresh: Compute again what an earlier call has computed.
        out: Folder of the results.
    """

    size: str = "default"
    seeds: int | None = None
    epochs: int | None = None
    dataset: str | None = None
    model: str | None = None
    data: Path | None = None
    device: str = "cpu"
    workers: int = 1
    fresh: bool = False
    out: Path = OUT

    def of_size(self, *, quick: Any, default: Any, full: Any) -> Any:
        """Return the value for this size."""
        return {"quick": quick, "default": default, "full": full}[self.size]


@dataclass(frozen=True)
class Finding:
    """A claim of a paper beside what was found: a row of the overview.

    Attributes:
        source: Paper, table or figure.
        claim: What the paper found, with its numbers.
        found: What was found here, with its numbers.
        verdict: ``AGREES``, ``DISAGREES`` or ``CANNOT_TELL``.
    """

    source: str
    claim: str
    found: str
    verdict: str

    def __post_init__(self) -> None:
        """Check the verdict.

        Raises:
            ValueError: It is none.
        """
        known = (AGREES, DISAGREES, CANNOT_TELL)
        if self.verdict not in known:
            raise ValueError(f"verdict is {self.verdict!r}, expected one of {known}")


@dataclass(frozen=True)
class Report:
    """What an experiment found.

    Attributes:
        text: Markdown, between the title and the findings: what was done, and tables.
        rows: The table that the CSV file holds; all rows have the same columns.
        figure: The picture.
        caption: Its alternative text.
        findings: At least one.
        notes: Markdown after the findings: what disagrees and why, what was not reached.
        training: Seconds of training of all runs added up, None where nothing was trained.
        sources: Hashes of our sources that the runs were made with, if not those of now.
    """

    text: str
    rows: Sequence[Mapping[str, object]]
    figure: Figure
    caption: str
    findings: Sequence[Finding]
    notes: str = ""
    training: float | None = None
    sources: Sequence[str] = ()


@dataclass(frozen=True)
class Experiment:
    """An experiment of the list.

    Attributes:
        name: As on the command line.
        title: Of the report.
        source: Papers, tables and figures.
        run: Makes it.
        datasets: That it can be made with; none if it has no data set.
    """

    name: str
    title: str
    source: str
    run: Callable[[Options], Report]
    datasets: Sequence[str] = field(default=())
