"""The report's JSON: every planned row is there from the start, and measuring fills it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu import checks, stages
from benchmarks.gpu.case import Case
from benchmarks.gpu.notes import OUT_OF_TIME, is_fault

Cells = dict[str, Any]

# Runs that agree in these are one measurement, made in pieces.
_SAME = ("device", "driver", "torch", "triton", "cuda", "source", "ours")


class Record:
    """Everything that a run measures.

    Args:
        header: What is the same for the whole run.
        cases: What is planned.
        names: Which contenders of every case.
        captured: Which cases are planned in captured form.
        ours: Name of the contender that the others are divided by.
    """

    def __init__(
        self,
        header: Mapping[str, Any],
        cases: Sequence[Case],
        names: Sequence[str],
        captured: Sequence[Case],
        ours: str,
    ) -> None:
        self._header = {**header, "ours": ours}
        self._rows: dict[tuple[Case, str], Cells] = {
            (case, name): {
                **case._asdict(),
                "tensors": len(case.sizes),
                "parameters": case.parameters,
                "contender": name,
                "note": OUT_OF_TIME,
            }
            for case in cases
            for name in names
        }
        self._captured: dict[Case, Cells] = {
            case: {**case._asdict(), "note": OUT_OF_TIME} for case in captured
        }
        self._operations: dict[tuple[Case, str, str], Cells] = {}
        self._problems: list[str] = []

    def carry_over(self, folder: Path) -> None:
        """Take over what an earlier run measured of the same sources with the same software.

        Whatever is measured again replaces it.
        """
        path = self._path(folder)
        report: Cells = json.loads(path.read_text()) if path.exists() else {}
        if any(report.get(key) != self._header[key] for key in _SAME):
            return
        for row in report["rows"]:
            case, name = _case_of(row), row["contender"]
            if not row["note"] or (case, name) not in self._rows:
                self._rows[case, name] = row
        for row in report["captured"]:
            if not row["note"] or _case_of(row) not in self._captured:
                self._captured[_case_of(row)] = row
        for row in report["operations"]:
            self._operations[_case_of(row), row["backend"], row["operation"]] = row

    def is_open(self, case: Case) -> bool:
        """Whether a contender of a case still waits for its turn."""
        rows = [row for (of, _), row in self._rows.items() if of == case]
        return any(row["note"] == OUT_OF_TIME for row in rows)

    def row(self, case: Case, name: str) -> Cells:
        """Return the cells of a contender, for reading."""
        return self._rows[case, name]

    def fill(self, case: Case, name: str, cells: Mapping[str, Any]) -> None:
        """Add cells to a contender's row; a row that has times needs no note."""
        self._rows[case, name].update({"note": "", **cells})

    def add(self, case: Case, name: str, cells: Mapping[str, Any]) -> None:
        """Add cells to a contender's row and leave its note."""
        self._rows[case, name].update(cells)

    def fill_captured(self, case: Case, cells: Mapping[str, Any]) -> None:
        """Take over what the captured form of a case gave."""
        self._captured[case] = {**case._asdict(), "note": "", **cells}

    def add_operations(self, case: Case, backend: str, rows: Iterable[Cells]) -> None:
        """Add the operations of one of our backends."""
        common = {**case._asdict(), "parameters": case.parameters, "backend": backend}
        for row in rows:
            self._operations[case, backend, row["operation"]] = {**common, "note": "", **row}

    def add_problem(self, text: str) -> None:
        """Note something that went wrong and is no row's own."""
        self._problems.append(text)

    def has_failures(self) -> bool:
        """Whether something went wrong that is no lack of time, memory or hardware."""
        notes = [row["note"] for row in [*self._rows.values(), *self._captured.values()]]
        return bool(self._problems) or any(map(is_fault, notes))

    def as_json(self, stage_results: Mapping[str, Any]) -> Cells:
        """Return the report; see :func:`with_checks`."""
        return with_checks(
            {
                **self._header,
                "stages": dict(stage_results),
                "problems": list(self._problems),
                "rows": list(self._rows.values()),
                "operations": list(self._operations.values()),
                "captured": list(self._captured.values()),
            }
        )

    def write(self, folder: Path) -> Path:
        """Write the JSON file and return its path."""
        results = stages.read(folder, self._header)
        path = self._path(folder)
        write_json(path, self.as_json(results))
        return path

    def _path(self, folder: Path) -> Path:
        return folder / f"gpu-{self._header['slug']}.json"


def _case_of(row: Cells) -> Case:
    return Case(row["shapes"], row["base"], row["dtype"])


def with_checks(report: Mapping[str, Any]) -> Cells:
    """Return a report with what is wanted compared with what it has."""
    return {**report, "checks": [one._asdict() for one in checks.outcomes(report)]}


def write_json(path: Path, report: Mapping[str, Any]) -> None:
    """Write a report at once: a run that is ended leaves the last whole one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".part")
    draft.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    os.replace(draft, path)
