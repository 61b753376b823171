"""A rank that fails in its second evaluation leaves no rank perturbed or waiting for ever.

The failing rank has its weights back at once, the others when their collective fails.
"""

from __future__ import annotations

from processes import run_ranks
from rank_failures import CASES, FAILING, GROUP_TIMEOUT, Outcome, dying, raising


def check(outcome: Outcome, error: str) -> None:
    assert outcome.error == error
    assert outcome.weights_are_back
    assert outcome.state_is_untouched
    assert not outcome.is_perturbed


def test_a_closure_that_raises_on_one_rank() -> None:
    """The others wait until their time is up, as they do for a rank that hangs."""
    results = run_ranks(raising, 2, timeout=90)
    for number, case in enumerate(CASES):
        for rank, outcomes in enumerate(results):
            outcome = outcomes[number]
            check(outcome, "ArithmeticError" if rank == FAILING else "RuntimeError")
            assert outcome.seconds < (2 if rank == FAILING else GROUP_TIMEOUT + 10), (case, rank)


def test_a_rank_that_dies() -> None:
    results = run_ranks(dying, 2, timeout=90, group_timeout=20, dying=[FAILING])
    for rank, outcome in enumerate(results):
        if rank != FAILING:
            check(outcome, "RuntimeError")
