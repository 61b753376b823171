"""Try every fault at every point of a step, on our optimizers and on a peer's.

    python -m benchmarks.reliability faults [--places N]

Writes ``benchmarks/results/reliability/faults.csv`` and the table in ``docs/reliability/faults.md``
between its markers; with ``--render`` only the table, from the file.
"""

from __future__ import annotations

import argparse
import csv
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from benchmarks.common import PROVENANCE, RESULTS, ROOT, Row, environment
from benchmarks.readme import filled
from benchmarks.reliability.fault_cases import applies, broken, trials, was_dropped
from benchmarks.reliability.fault_matrix import GAPS, MATRIX, Kind, Point, why_empty
from benchmarks.reliability.fault_subjects import PEER, PEERS, SUBJECTS, Subject, peer_version
from benchmarks.reliability.fault_trials import Left, observe

FILE = RESULTS / "reliability" / "faults.csv"
PAGE = ROOT / "docs" / "reliability" / "faults.md"
BACKENDS = ("cpu", "eager")

OURS = "wsam_fused"
_COUNTS = {left: left.name.lower() for left in Left}
FIELDS = ("who", "point", "kind", "trials", "broken", "gaps", *_COUNTS.values())
FIELDS += ("version", *PROVENANCE)


# ---- running ---------------------------------------------------------------------------------


def run(places: int) -> list[Row]:
    """Run all trials.

    Args:
        places: At most so many of the places of a phase, for every subject.
    """
    rows = []
    for (point, kind), cell in MATRIX.items():
        if cell.shown_by:
            continue
        for who, subjects in ((OURS, SUBJECTS), (PEER, PEERS)):
            counts = count(point, kind, subjects, places)
            if counts["trials"]:
                rows.append(_row(who, point, kind, counts, places))
                print(f"{who}: {kind.value}, {point.value}: {dict(counts)}", flush=True)
    return rows


def count(point: Point, kind: Kind, subjects: Mapping[str, Subject], places: int) -> Counter[str]:
    """Run the trials of one cell and count what they left behind."""
    found: Counter[str] = Counter()
    for name, backend, subject in _each(subjects):
        if not applies(point, kind, subject):
            continue
        for trial in trials(point, kind, subject, backend, places):
            seen = observe(subject, backend, trial.fault, trial.prepare)
            if was_dropped(kind, seen):
                continue
            found["trials"] += 1
            found[_COUNTS[seen.left]] += 1
            if broken(point, kind, subject, seen) is not None:
                is_gap = (name, backend, point, kind) in GAPS
                found["gaps" if is_gap else "broken"] += 1
    return found


def _each(subjects: Mapping[str, Subject]) -> Iterator[tuple[str, str, Subject]]:
    for name, subject in subjects.items():
        for backend in BACKENDS if subject.is_ours else ("",):
            yield name, backend, subject


def _row(who: str, point: Point, kind: Kind, counts: Counter[str], places: int) -> Row:
    from wsam_fused import __version__

    found = {name: str(counts[name]) for name in ("trials", "broken", "gaps", *_COUNTS.values())}
    return {
        "who": who,
        "point": point.name,
        "kind": kind.name,
        **found,
        "version": __version__ if who == OURS else peer_version(),
        **environment(f"python -m benchmarks.reliability faults --places {places}"),
    }


# ---- the table -------------------------------------------------------------------------------


def table(path: Path = FILE) -> str:
    """Return the Markdown of the matrix, with the counts of a result file."""
    with path.open(newline="") as file:
        rows = {(row["who"], row["point"], row["kind"]): row for row in csv.DictReader(file)}
    ours, peer = (next(r for r in rows.values() if r["who"] == who) for who in (OURS, PEER))
    lines = [
        f"| point of the step | fault | afterwards, {OURS} | kept | {PEER} {peer['version']} |",
        "|---|---|---|---:|---|",
    ]
    for point in Point:
        for kind in Kind:
            if (point, kind) in MATRIX:
                cells = [rows.get((who, point.name, kind.name)) for who in (OURS, PEER)]
                lines.append(_line(point, kind, *cells))
    total = sum(int(row["trials"]) for row in rows.values() if row["who"] == OURS)
    failed = sum(int(row["broken"]) for row in rows.values() if row["who"] == OURS)
    gaps = sum(int(row["gaps"]) for row in rows.values() if row["who"] == OURS)
    caption = (
        f"{total} faults in steps of {len(SUBJECTS)} optimizers of {OURS}, {failed} broken "
        f"promises, {gaps} in the gaps below; `{ours['command']}`, {ours['device']}, torch "
        f"{ours['torch']}, {ours['date']}."
    )
    return "\n\n".join([caption, "\n".join(lines), _gaps(), _empty()])


def _line(point: Point, kind: Kind, ours: Row | None, peer: Row | None) -> str:
    cell = MATRIX[point, kind]
    kept = f"`{cell.shown_by}`"
    if ours is not None:
        good = int(ours["trials"]) - int(ours["broken"]) - int(ours["gaps"])
        kept = f"{good} of {ours['trials']}"
    columns = (point.value, kind.value, cell.promise.value, kept, _of_peer(kind, peer))
    return f"| {' | '.join(columns)} |"


def _of_peer(kind: Kind, row: Row | None) -> str:
    if row is None:
        return "not tried"
    if kind == Kind.MISSING:
        others = int(row["broken"])
        likewise = int(row["trials"]) - others
        return f"of {row['trials']}: likewise {likewise}, updated all the same {others}"
    found = [f"{left.value} {row[name]}" for left, name in _COUNTS.items() if int(row[name])]
    return f"of {row['trials']}: {', '.join(found)}"


def _gaps() -> str:
    lines = [
        f"* {name}, backend `{backend}`, {kind.value}, {point.value}: {why}."
        for (name, backend, point, kind), why in GAPS.items()
    ]
    return "Not kept:\n\n" + "\n".join(lines)


def _empty() -> str:
    reasons: dict[tuple[Kind, str], list[str]] = {}
    for kind in Kind:
        for point in Point:
            if (point, kind) not in MATRIX:
                reasons.setdefault((kind, why_empty(point, kind)), []).append(point.value)
    lines = [f"* {kind.value}: {why}. ({'; '.join(at)})" for (kind, why), at in reasons.items()]
    return "Cells that are not in the table, and why:\n\n" + "\n".join(lines)


def main(argv: list[str]) -> None:
    """Run, and write the results and the table."""
    parser = argparse.ArgumentParser("faults", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--places", type=int, default=60, help="how many places of a phase are tried (default 60)"
    )
    parser.add_argument("--render", action="store_true", help="write the table only")
    arguments = parser.parse_args(argv)
    if arguments.places < 1:
        parser.error(f"--places is {arguments.places}, expected a number >= 1")
    torch.set_num_threads(1)
    if not arguments.render:
        rows = run(arguments.places)
        FILE.parent.mkdir(parents=True, exist_ok=True)
        with FILE.open("w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    PAGE.write_text(filled(PAGE.read_text(), {"matrix": table()}))
