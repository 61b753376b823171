"""The papers' experiments: each runs, writes what it found, and goes on after a kill."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import cifar_folders
import pytest

pytest.importorskip("sklearn", reason="the experiments train on scikit-learn's data sets")
pytest.importorskip("matplotlib", reason="the experiments draw pictures")
pytest.importorskip("tqdm", reason="the experiments show progress bars")

from benchmarks.common import ROOT
from benchmarks.paper import __main__ as paper
from benchmarks.paper import cifar, data, training
from benchmarks.paper.catalog import EXPERIMENTS
from benchmarks.paper.experiment import AGREES, CANNOT_TELL, DISAGREES

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder that the experiments share, as they share runs."""
    return tmp_path_factory.mktemp("paper")


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_quick_form_writes_tables_picture_and_overview(
    name: str, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert paper.main([name, "--quick", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    page = (out / f"{name}.md").read_text()
    assert EXPERIMENTS[name].title in page
    assert f"python -m benchmarks.paper {name} --quick" in page
    assert (out / f"{name}.png").read_bytes().startswith(_PNG_SIGNATURE)
    assert f"]({name}.png)" in page
    rows = _rows(out / f"{name}.csv")
    assert rows
    assert all("" not in list(row.values())[:1] for row in rows)
    findings = [row for row in _rows(out / "findings.csv") if row["experiment"] == name]
    assert findings
    overview = (out / "README.md").read_text()
    for finding in findings:
        assert finding["verdict"] in (AGREES, DISAGREES, CANNOT_TELL)
        assert finding["size"] == "quick"
        assert finding["found"] in overview
        assert finding["claim"] in page
        assert f"{finding['found']}: {finding['verdict']}" in shown
    assert f"[{name}]({name}.md)" in overview
    assert f"]({name}.png)" in overview


def test_without_a_name_lists_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert paper.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [*EXPERIMENTS, "all"]
    expected = "toy accuracy label-noise geometry ablation minima sensitivity finetune convergence"
    assert {*expected.split(), "m-sharpness"} <= set(EXPERIMENTS)


def test_made_runs_are_not_made_again(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["ablation", "--quick", "--out", str(out)]
    paper.main(arguments)
    before, page = (out / "runs.csv").read_bytes(), (out / "ablation.md").read_bytes()
    calls: list[object] = []
    monkeypatch.setattr("benchmarks.paper.pool.run", lambda *given: calls.append(given))
    paper.main(arguments)
    assert calls == []
    assert (out / "runs.csv").read_bytes() == before
    assert (out / "ablation.md").read_bytes() == page
    with pytest.raises(TypeError, match="dataclass"):  # of the None that stands for an outcome
        paper.main([*arguments, "--fresh"])
    assert calls


def test_killed_command_goes_on_where_it_was(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.paper", "sensitivity", "--quick"]
    command += ["--workers", "2", "--out", str(tmp_path)]
    runs = tmp_path / "runs.csv"
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120.0
        while not (runs.exists() and runs.read_bytes().count(b"\n") > 3):
            assert process.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
    kept = runs.read_bytes()
    kept = kept[: kept.rfind(b"\n") + 1]
    with runs.open("ab") as file:
        file.write(b"digits,resnet-small,SA")  # what a kill in the middle of a line leaves
    assert paper.main([*command[3:], "--workers", "1"]) == 0
    assert runs.read_bytes().startswith(kept)
    specs = [tuple(row.values())[:14] for row in _rows(runs)]
    assert len(specs) == len(set(specs)) > kept.count(b"\n") - 1
    assert all(row["test_accuracy"] for row in _rows(runs))


def test_cifar_folder_is_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cifar.PUBLISHED, "cifar10", cifar_folders.small("cifar10"))
    folder = cifar_folders.write_binary("cifar10", tmp_path)
    data.load.cache_clear()
    training._prepared.cache_clear()
    arguments = ["ablation", "--quick", "--dataset", "cifar10", "--model", "resnet-small"]
    arguments += ["--data", str(folder), "--out", str(tmp_path / "out")]
    try:
        assert paper.main(arguments) == 0
    finally:
        data.load.cache_clear()
        training._prepared.cache_clear()
    assert {row["dataset"] for row in _rows(tmp_path / "out" / "runs.csv")} == {"cifar10"}
    assert "resnet18, cifar10" in (tmp_path / "out" / "ablation.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["nothing"], ["NAME", "'nothing'", "accuracy"]),
        (["toy", "--dataset", "digits"], ["--dataset", "'digits'", "no data set"]),
        (["label-noise", "--dataset", "cifar100"], ["--dataset", "'cifar100'", "cifar10"]),
        (["accuracy", "--seeds", "1"], ["--seeds", "1 is out of range", "[2, 1000]"]),
        (["accuracy", "--epochs", "x"], ["--epochs", "'x' is no number", "[1, 10000]"]),
        (["accuracy", "--full", "--quick"], ["--quick", "--full"]),
        (["accuracy", "--device", "nowhere"], ["--device", "'nowhere'"]),
        (["accuracy", "--quick", "--model", "resnet18"], ["--model", "'resnet18'", "breast"]),
    ],
    ids=lambda value: " ".join(value) if "--" in str(value) else "",
)
def test_wrong_argument_is_named(
    arguments: list[str], named: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        paper.main([*arguments, "--out", str(tmp_path)])
    message = capsys.readouterr().err
    for part in named:
        assert part in message
    assert not list(tmp_path.iterdir())


def test_full_size_without_cifar_says_what_to_download(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        paper.main(["accuracy", "--full", "--data", str(tmp_path), "--out", str(tmp_path / "out")])
    message = capsys.readouterr().err
    assert "cs.toronto.edu" in message
    assert str(tmp_path) in message
