"""The result file of the memory of training steps, and what is made of it."""

from __future__ import annotations

from pathlib import Path

from benchmarks import bench_training_memory, training_memory
from benchmarks.common import RESULTS, read_rows
from benchmarks.contenders.libraries import OursInBackward
from benchmarks.training_nets import NETS

ROWS = read_rows(RESULTS / "cpu-training-memory.csv")


def rows(in_backward: int) -> list[dict[str, object]]:
    common = dict.fromkeys(training_memory.FIELDS, "-")
    sizes = {"parameter_bytes": 1000, "largest_bytes": 100, "plain_bytes": 4000}
    names = {"net": "a net", "base": "AdamW", "dtype": "float32"}
    peaks = {"plain": 4000, "authors": 7000, "wsam_fused": 5000, OursInBackward.name: in_backward}
    return [
        {**common, **sizes, **names, "contender": contender, "peak_bytes": peak}
        for contender, peak in peaks.items()
    ]


def test_the_promise_is_compared(tmp_path: Path) -> None:
    for peak, expected in ((4200, "1.024: reached"), (4900, "1.195: NOT REACHED")):
        text = training_memory.write(tmp_path / "found.csv", rows(peak))
        assert (tmp_path / "found.md").read_text() == text
        assert expected in text
        assert "0.0 MB of parameters, 10.0% in the largest one." in text


def test_the_summary_is_in_lists(tmp_path: Path) -> None:
    training_memory.write(tmp_path / "found.csv", rows(4150))
    lines = training_memory.summary(read_rows(tmp_path / "found.csv")).splitlines()
    found = [line.split("|")[2].strip() for line in lines if line.startswith("| ")]
    assert found == ["a net", "3.00", "1.00", "0.15", "0.10", "4.00"]


def test_the_results_are_of_all_nets_and_reach_what_is_promised() -> None:
    """Where activations are few, or checkpointed."""
    found = {(row["net"], row["contender"]): row for row in ROWS}
    names = [one.name for one in bench_training_memory.CONTENDERS]
    assert list(found) == [(net.name, name) for net in NETS for name in names]
    for net in NETS:
        row = found[net.name, OursInBackward.name]
        promised = float(row["plain_bytes"]) + float(row["largest_bytes"])
        reached = float(row["peak_bytes"]) <= promised * (1 + training_memory.SLACK)
        assert reached is (net.name != "transformer, 4 x 128")
    text = (RESULTS / "cpu-training-memory.md").read_text()
    assert training_memory.render(ROWS) == text
