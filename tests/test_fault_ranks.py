"""The fault matrix, sum of norms over ranks: all ranks end as they were, and go on."""

from __future__ import annotations

import fault_ranks
from processes import run_ranks

RANKS = 2


def test_a_sum_that_fails() -> None:
    for outcomes in run_ranks(fault_ranks.raising, RANKS, RANKS):
        assert len(outcomes) == 12
        for (method, failing, name), outcome in outcomes.items():
            error = fault_ranks.ERRORS[name].__name__
            expected = fault_ranks.Outcome(error, True, False, 0, True)
            assert outcome == expected, (method, failing, name)


def test_a_gradient_that_is_not_finite_on_one_rank() -> None:
    for outcomes in run_ranks(fault_ranks.poisoned, RANKS, RANKS):
        for case, outcome in outcomes.items():
            assert outcome == fault_ranks.Outcome("nothing", True, False, 1, True), case


def test_a_rank_that_dies() -> None:
    """The others notice when they sum, and their weights are back."""
    dying = [fault_ranks.DYING]
    found = run_ranks(fault_ranks.dying, RANKS, RANKS, group_timeout=20, timeout=90, dying=dying)
    moved, outcome = found[0]
    assert moved
    assert outcome == fault_ranks.Outcome("RuntimeError", True, False, 0, False)
