"""What the stages of ``gpu_report.sh`` gave.

    python -m benchmarks.gpu.stages STAGE --exit CODE --seconds S --logs FOLDER --out FOLDER

Reads the stage's log (and the tests' XML) and adds what it says to ``stages.json``.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

from benchmarks.common import source_hash
from benchmarks.gpu.machine import label

FILE = "stages.json"
STAGES = ("build", "tests", "sanitize", "bench")

_RUN = re.compile(r"^== run: (?P<name>.+)$", re.MULTILINE)
_EXIT = re.compile(r"^== exit: (\d+)$", re.MULTILINE)
# memcheck, and racecheck with its hazards.
_ERRORS = re.compile(r"ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard")
_COMPARED = re.compile(r"^compared (\d+) steps, (\d+) rows differ", re.MULTILINE)
_BUILT = re.compile(r"^== built in ([\d.]+) s$", re.MULTILINE)


def read(folder: Path, report: Mapping[str, Any]) -> dict[str, Any]:
    """Return the results of the stages that ran on a report's sources and device, by stage."""
    return {
        stage: result
        for stage, result in _all(folder / FILE).items()
        if all(result[key] == report[key] for key in ("source", "device"))
    }


def _all(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


def result_of(stage: str, folder: Path) -> dict[str, Any]:
    """Return what the log of a stage says; None where it does not."""
    log = folder / f"{stage}.log"
    text = log.read_text(errors="replace") if log.exists() else ""
    if stage == "build":
        match = _BUILT.search(text)
        return {"built_s": float(match.group(1)) if match else None}
    if stage == "tests":
        return _tests(folder / "tests.xml")
    if stage == "sanitize":
        return _sanitize(text)
    return {}


def _tests(path: Path) -> dict[str, Any]:
    """Count outcomes; a file of tests that needs what is not installed is not a failure."""
    keys = ("passed", "skipped", "failures", "files_not_collected")
    if not path.exists():  # pytest writes it at its end
        return dict.fromkeys(keys)
    counts = dict.fromkeys(keys, 0)
    for case in ElementTree.parse(path).getroot().iter("testcase"):
        error = case.find("error")
        if error is not None and error.get("message") == "collection failure":
            needs = "ModuleNotFoundError" in (error.text or "")
            counts["files_not_collected" if needs else "failures"] += 1
        elif error is not None or case.find("failure") is not None:
            counts["failures"] += 1
        else:
            counts["passed" if case.find("skipped") is None else "skipped"] += 1
    return counts


def _sanitize(text: str) -> dict[str, Any]:
    """Count the runs that failed; one without a summary of the tool is a failure, too."""
    names = [match.group("name") for match in _RUN.finditer(text)]
    runs = []
    for name, part in zip(names, _RUN.split(text)[2::2], strict=True):
        ended, compared = _EXIT.search(part), _COMPARED.search(part)
        counts = [int(errors or hazards) for errors, hazards in _ERRORS.findall(part)]
        if name.startswith("alone") and compared:  # under no tool
            counts = [int(compared.group(2))]
        runs.append(
            {
                "name": name,
                "exit": int(ended.group(1)) if ended else None,
                "errors": max(counts) if counts else None,
                "steps": int(compared.group(1)) if compared else None,
            }
        )
    good = [run["exit"] == 0 and run["errors"] == 0 for run in runs]
    return {"runs": runs, "failures": good.count(False) if runs else None}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--exit", type=int, required=True, help="exit code of the stage")
    parser.add_argument("--seconds", type=float, required=True, help="how long it took")
    parser.add_argument("--logs", type=Path, required=True, help="folder of the logs")
    parser.add_argument("--out", type=Path, required=True, help="folder of stages.json")
    options = parser.parse_args(arguments)
    result = {
        "exit": options.exit,
        "seconds": options.seconds,
        "source": source_hash(),
        "device": label(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
        **result_of(options.stage, options.logs),
    }
    path = options.out / FILE
    path.write_text(json.dumps({**_all(path), options.stage: result}, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
