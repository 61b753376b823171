"""What the package says of itself: docstrings, their examples, the command line, the layout."""

from __future__ import annotations

import doctest
import inspect
import subprocess
import sys
from typing import Any

import pytest
import torch
from problems import INDEX

import wsam_fused
from benchmarks import readme
from wsam_fused import _extension, plan
from wsam_fused.methods import METHODS


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__name__)
def test_docstring_has_every_argument_and_an_example_that_runs(method: Any) -> None:
    text = inspect.getdoc(method) or ""
    assert "{" not in text, "a shared text was not filled in"
    for section in ("Math:", "Args:", "Raises:", "Differs from", "Reference:", "Example:"):
        assert section in text
    signature = inspect.signature(method)
    for name in signature.parameters:
        assert f"    {name}: " in text or f"    **{name}: " in text, f"{name} is not documented"
    names = {"torch": torch, **vars(wsam_fused)}
    examples = doctest.DocTestFinder().find(method, method.__name__, globs=names)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    for example in examples:
        runner.run(example)
    assert runner.tries > 3
    assert runner.failures == 0


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__name__)
def test_signature_shows_the_options(method: Any) -> None:
    parameters = inspect.signature(method).parameters
    expected = ["params", "base_optimizer", "rho"]
    options = ["geometry", "eta", "adaptive", "only_weights", "every", "eps", "max_grad_norm"]
    options += ["check_finite", "restore", "backend", "model"]
    assert list(parameters)[:3] == expected
    assert [name for name in parameters if name in options] == options
    assert parameters["rho"].default == (0.1 if method.__name__ == "GNP" else 0.05)


def test_command_line_prints_backends_and_reasons() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "wsam_fused"], capture_output=True, text=True, check=True
    )
    for expected in (wsam_fused.__version__, torch.__version__, "eager", "cpu", "bfloat16", "why"):
        assert expected in run.stdout


def test_figures_in_the_readme_are_those_of_the_results() -> None:
    text = (readme.ROOT / "README.md").read_text()
    assert readme.filled(text, readme.blocks()) == text, "run python -m benchmarks.readme"


def test_the_readme_counts_the_trajectories_that_there_are() -> None:
    cases = [case["peer"] for case in INDEX["cases"]]
    peers = {peer.partition("+")[0] for peer in cases if not peer.startswith("none")}
    public = sum(not peer.startswith("none") for peer in cases)
    text = " ".join((readme.ROOT / "README.md").read_text().split())
    assert len(peers) == 9
    assert f"{len(cases)} trajectories, {public} of them of nine public implementations" in text


@pytest.mark.skipif(_extension.UNAVAILABLE is not None, reason=str(_extension.UNAVAILABLE))
def test_layout_of_the_tables_is_that_of_the_extension() -> None:
    assert list(torch.ops.wsam_fused.layout()) == plan.LAYOUT


def test_an_extension_with_another_layout_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    if _extension.UNAVAILABLE is not None:
        pytest.skip(_extension.UNAVAILABLE)
    monkeypatch.setattr(_extension, "LAYOUT", [0])
    reason = _extension._load()
    assert reason is not None
    assert "was built from other sources" in reason
