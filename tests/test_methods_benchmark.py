"""The benchmark of the methods, and what the docs make of it and of the tests."""

from __future__ import annotations

import csv
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("tqdm", reason="the benchmark shows a progress bar")

from benchmarks import bench_methods, parity, readme
from benchmarks.contenders.contender import BASES
from benchmarks.methods import results
from benchmarks.methods.cases import CASES
from benchmarks.methods.given import GivenGradients
from wsam_fused.methods import METHODS

DOCUMENT = readme.METHODS.read_text()


def test_a_quick_run_measures_every_method(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bench_methods.main(["--quick", "--rounds", "2", "--out", str(tmp_path)])
    shown = capsys.readouterr().out
    assert (tmp_path / "cpu-methods.md").read_text() + "\n" == shown
    with (tmp_path / "cpu-methods.csv").open() as file:
        rows = list(csv.DictReader(file))
    for base, moved in (("AdamW", 12), ("SGDM", 10)):
        chosen = [row for row in rows if row["case"].endswith(base)]
        assert [row["method"] for row in chosen] == [case.name for case in CASES]
        reference = next(row for row in chosen if row["method"] == "WSAM")
        assert (reference["ratio"], reference["moved"]) == ("1", str(moved))
        assert all(float(row["ratio"]) > 0 for row in chosen)
    steps = [row for row in rows if row["part"] == "step"]
    assert {row["method"] for row in steps} >= {"SGDM", "SAM", "ESAM", "RWSAM"}
    text = results.summary(rows)
    assert all(f"| {case.name} " in text for case in CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_given_gradients_make_whole_steps(case: Any) -> None:
    given = GivenGradients([(33, 17), (5,)])
    base = BASES["AdamW"]
    optimizer = case.make(given.params, base.optimizer, **base.options)
    for number in range(3):
        before = [param.detach().clone() for param in given.params]
        assert given.step(case, optimizer) > 0
        assert not any(torch.equal(p, w) for p, w in zip(given.params, before, strict=True))
        counts = {float(entry["step"]) for entry in optimizer.state.values()}
        assert counts == {number + 1.0}
        assert not optimizer.is_perturbed


def test_what_is_reached() -> None:
    assert results.reached({"ratio": "1.2", "allowed": "1.3"}) is True
    assert results.reached({"ratio": "1.4", "allowed": "1.3"}) is False
    assert results.reached({"ratio": "1.4", "allowed": ""}) is None


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--rounds", "0"], "--rounds"),
        (["--shapes", "cube"], "'cube'"),
        (["--bases", "Lion"], "'Lion'"),
    ],
)
def test_a_wrong_argument_is_named(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        bench_methods.parse(arguments)
    assert expected in capsys.readouterr().err


# ---- docs/methods.md -----------------------------------------------------------------------------


def test_figures_in_the_docs_are_those_of_the_results() -> None:
    expected = readme.filled(DOCUMENT, readme.method_blocks())
    assert expected == DOCUMENT, "run python -m benchmarks.readme"


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__name__)
def test_the_table_has_every_method_with_its_defaults(method: Any) -> None:
    rows = [line for line in DOCUMENT.splitlines() if line.startswith(f"| `{method.__name__}")]
    own = inspect.signature(vars(method)["__init__"]).parameters
    for name, parameter in own.items():
        if parameter.kind is parameter.KEYWORD_ONLY and name not in ("seed", "decouple"):
            assert f"`{name}={parameter.default}`" in rows[0]


def test_the_parity_table_has_every_method_and_no_large_difference() -> None:
    block = DOCUMENT.partition("<!-- parity -->")[2].partition("<!-- end -->")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in block.splitlines()]
    rows = [row for row in rows if len(row) == 10 and row[0] != "method" and "---" not in row[0]]
    found = {(row[0], row[1]) for row in rows}
    methods = {method.__name__ for method in METHODS} | {"Coupled-WSAM", "BSAM, as published"}
    assert {(m, g) for m in methods for g in ("euclidean", "adaptive", "fisher")} <= found
    for row in rows:
        assert row[9].startswith("cpu, cuda (a)"), row
        for cell in (row[4], row[5], row[7]):
            assert cell == "-" or float(cell) <= 1e-10, row


def test_the_parity_table_takes_the_worst_and_counts() -> None:
    def entry(kind: str, backend: str, dtype: str, difference: float, **more: Any) -> Any:
        names = {"method": "SAM", "geometry": "fisher", "backend": backend, "dtype": dtype}
        return {"kind": kind, **names, "difference": difference, **more}

    of_peer = {"peer": "somebody.SAM", "cases": 7}
    text = parity.render(
        [
            entry("trajectory", "eager", "float64", 3e-15, **of_peer),
            entry("trajectory", "cpu", "float64", 1e-14, **of_peer),
            entry("trajectory", "cuda-emulated", "float64", 2e-14, **of_peer),
            entry("step", "cpu", "float32", 4e-7, cases=1),
        ],
        "here",
    )
    row = next(line for line in text.splitlines() if line.startswith("| SAM"))
    cells = [re.sub(r"\s+", " ", cell.strip()) for cell in row.split("|")[1:-1]]
    expected = ["SAM", "fisher", "somebody.SAM", "7", "3e-15", "2e-14", "-", "-", "4e-07"]
    assert cells == [*expected, "cpu, cuda (a)"]


def test_parity_without_a_file_says_what_to_run(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parity.main(["no-such-file.json"])
    assert "run make parity" in capsys.readouterr().err
