"""Every file of examples/ runs as it is and learns what it says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHARED = ("digits",)
EXAMPLES = [p for p in sorted((ROOT / "examples").glob("*.py")) if p.stem not in SHARED]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example(example: Path) -> None:
    text = example.read_text()
    for library in re.findall(r"^# Needs: (\w+)$", text, re.MULTILINE):
        if find_spec(library) is None:
            pytest.skip(f"{library} is not installed")
    wanted = re.search(r"^# Reaches: accuracy (0\.\d+)$", text, re.MULTILINE)
    assert wanted, f"{example.name} does not say which accuracy it reaches"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(example)],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    reached = re.search(r"^accuracy: ([\d.]+)$", done.stdout, re.MULTILINE)
    assert reached, done.stdout
    assert float(reached[1]) >= float(wanted[1])
