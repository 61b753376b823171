"""The fault matrix, SIGKILL: what resumes is the run that was not killed, bit for bit."""

from __future__ import annotations

import multiprocessing
import signal
from pathlib import Path

import fault_kill
import pytest
import torch

from wsam_fused import _extension

# Everywhere with one, and within the update with others: what they save differs.
CASES = [("WSAM, AdamW, two dtypes", where) for where in fault_kill.WHERE]
OTHERS = ("SAM, AdamW, master weights", "BSAM, SGDM", "WSAM, RMSprop")
CASES += [(name, "update") for name in OTHERS]


@pytest.mark.parametrize(("name", "where"), CASES)
def test_a_killed_training_resumes(name: str, where: str, tmp_path: Path) -> None:
    backend = "eager" if _extension.UNAVAILABLE else "cpu"
    multiprocessing.set_forkserver_preload(["wsam_fused"])
    context = multiprocessing.get_context("forkserver")
    arguments = (name, backend, where, str(tmp_path))
    process = context.Process(target=fault_kill.train, args=arguments)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert (tmp_path / f"{fault_kill.FILE}.unfinished").exists() == (where == "checkpoint")
    checkpoint = torch.load(tmp_path / fault_kill.FILE, weights_only=True)
    assert checkpoint["next"] == fault_kill.KILLED_IN
    resumed = fault_kill.resumed(name, backend, tmp_path)
    wanted = fault_kill.uninterrupted(name, backend)
    assert resumed.steps == wanted.steps
    assert all(map(torch.equal, resumed.weights, wanted.weights))
    assert all(map(torch.equal, resumed.states, wanted.states))
