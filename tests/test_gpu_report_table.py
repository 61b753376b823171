"""What the GPU report says of its figures: checks and tables."""

from __future__ import annotations

import pytest
from gpu_reports import CASES, filled, record

from benchmarks import gpu_table
from benchmarks.gpu import checks
from benchmarks.gpu.record import with_checks

FULL = filled(good=True)


@pytest.mark.parametrize(("good", "verdict"), [(True, "reached"), (False, "NOT REACHED")])
def test_every_check_tells_reached_from_not_reached(good: bool, verdict: str) -> None:
    report = filled(good=good)
    assert len(report["checks"]) == len(checks.CHECKS) > 40
    others = [check for check in report["checks"] if check["verdict"] != verdict]
    assert others == []


@pytest.mark.parametrize("check", checks.CHECKS, ids=lambda check: f"{check.where}: {check.wanted}")
def test_every_check_says_why_it_is_not_measured(check: checks.Check) -> None:
    missing = check.find({})
    assert missing.value is None
    assert missing.reason
    assert check.find(FULL).value is not None


def test_a_missing_rival_is_not_measured_with_its_own_reason() -> None:
    report = filled(good=True)
    for row in report["rows"]:
        if row["contender"] == "authors" and row["shapes"] == "llama-1b":
            row["note"] = "does not fit"
            del row["ratio_to_ours"]
    found = [c for c in with_checks(report)["checks"] if c["verdict"] == "not measured"]
    assert [(c["shapes"], c["measured"]) for c in found] == [
        ("llama-1b, AdamW, float32", "does not fit")
    ]


def test_table_of_a_full_report() -> None:
    text = gpu_table.render(filled(good=True))
    assert text.startswith("# WSAM on NVIDIA H100 80GB HBM3\n")
    assert "dry run" not in text
    assert "60 s from a clean tree" in text
    assert "5 passed, 0 failed, 1 skipped; 1 files need what is not installed" in text
    assert "memcheck cuda: 0 errors, 8 steps, exit code 0" in text
    assert "6, 1 copies, 0 fills" in text
    # Never filled: its row is there all the same.
    assert "| foreach-compiled | not measured: out of time" in text
    assert "| gpt2-small, SGDM, bfloat16 " in text.split("## Operations of a step")[1]
    assert text.count("\n### ") == len(CASES)


def test_table_of_an_empty_report() -> None:
    text = gpu_table.render(record().as_json({}))
    assert "| build    | not run" in text
    assert "reached" not in text.lower()
    assert "Not measured." in text.split("## Operations of a step")[1]


def test_a_fault_is_told_from_a_lack() -> None:
    one = record()
    assert not one.has_failures()
    one.fill(CASES[0], "cuda", {"note": "failed: RuntimeError: launch"})
    assert one.has_failures()
    another = record()
    another.add_problem("something")
    assert another.has_failures()
    assert "* something" in gpu_table.render(another.as_json({}))
