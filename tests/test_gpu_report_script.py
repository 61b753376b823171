"""The script of the GPU report and its stages, with a stub in place of python."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from gpu_reports import HEADER, STAGES, record

from benchmarks import gpu_table
from benchmarks.common import ROOT, source_hash
from benchmarks.gpu import stages

SCRIPT = ROOT / "benchmarks" / "gpu_report.sh"
SANITIZE_LOG = """\
== run: alone cuda
compared 6 steps, 2 rows differ
== exit: 1
== run: memcheck cuda
compared 6 steps, 0 rows differ
========= ERROR SUMMARY: 0 errors
== exit: 0
== run: racecheck cuda
compared 6 steps, 0 rows differ
========= RACECHECK SUMMARY: 3 hazards displayed (3 errors, 0 warnings)
== exit: 9
== run: memcheck triton
== exit: 124
"""
TESTS_XML = """\
<testsuites><testsuite>
<testcase name="a"/><testcase name="b"><skipped/></testcase><testcase name="c"><failure/></testcase>
<testcase name="d"><error message="collection failure">ModuleNotFoundError: x</error></testcase>
<testcase name="e"><error message="collection failure">SyntaxError: x</error></testcase>
</testsuite></testsuites>
"""


def test_stages_read_their_logs(tmp_path: Path) -> None:
    (tmp_path / "sanitize.log").write_text(SANITIZE_LOG)
    found = stages.result_of("sanitize", tmp_path)
    assert [run["errors"] for run in found["runs"]] == [2, 0, 3, None]
    assert [run["steps"] for run in found["runs"]] == [6, 6, 6, None]
    assert found["failures"] == 3
    (tmp_path / "tests.xml").write_text(TESTS_XML)
    expected = {"passed": 1, "skipped": 1, "failures": 2, "files_not_collected": 1}
    assert stages.result_of("tests", tmp_path) == expected
    assert stages.result_of("build", tmp_path) == {"built_s": None}
    (tmp_path / "build.log").write_text("compiling\n== built in 61.5 s\n")
    assert stages.result_of("build", tmp_path) == {"built_s": 61.5}


def test_a_report_takes_in_stages_of_its_own_sources_and_device_only(tmp_path: Path) -> None:
    report = record().as_json({})
    path = tmp_path / "gpu-h100.json"
    path.write_text(json.dumps(report))
    mine = {"source": HEADER["source"], "device": HEADER["device"]}
    results = {
        "build": {**STAGES["build"], **mine},
        "tests": {**STAGES["tests"], **mine, "source": "other"},
        "sanitize": {**STAGES["sanitize"], **mine, "device": "NVIDIA H200"},
    }
    (tmp_path / "stages.json").write_text(json.dumps(results))
    gpu_table.main(["--update", str(path)])
    assert list(gpu_table.read(path)["stages"]) == ["build"]
    assert "60 s from a clean tree" in path.with_suffix(".md").read_text()


def executable(path: Path, text: str) -> str:
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


def run_script(tmp_path: Path, python: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "PYTHON": executable(tmp_path / "python", python),
        "OUT": str(tmp_path / "out"),
        "SANITIZER": executable(tmp_path / "sanitizer", "#!/bin/sh\necho stub\n"),
    }
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments], env=environment, capture_output=True, text=True
    )


def test_script_parses_and_refuses_unknown_stages(tmp_path: Path) -> None:
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)
    run = run_script(tmp_path, "#!/bin/sh\nexit 1\n", "build", "polish")
    assert run.returncode == 2
    assert "stage is 'polish', expected some of: build tests sanitize bench" in run.stderr


def test_script_goes_on_after_a_stage_that_fails(tmp_path: Path) -> None:
    library = sorted((ROOT / "wsam_fused").glob("_C*.so"))
    python = f"""#!/bin/sh
case "$*" in
  *setup.py*) echo "cannot compile"; exit 3 ;;
  *wsam_fused|*"import pytest_benchmark"*) ;;
  *"-m pytest"*) echo "all is well" ;;
  *) exec {sys.executable} "$@" ;;
esac
"""
    run = run_script(tmp_path, python, "build", "tests")
    assert run.returncode == 1, run.stderr
    assert "failed: build\n" in run.stderr
    out = tmp_path / "out"
    log = (out / "gpu_report.log").read_text()
    assert log.index("cannot compile") < log.index("all is well")
    results = json.loads((out / "stages.json").read_text())
    assert {stage: result["exit"] for stage, result in results.items()} == {"build": 3, "tests": 0}
    assert {result["source"] for result in results.values()} == {source_hash()}
    # What worked before is still there.
    assert sorted((ROOT / "wsam_fused").glob("_C*.so")) == library
