"""Random sequences of public calls agree with a model of the optimizer; see random_calls.py."""

from __future__ import annotations

from random_calls import RandomCalls, run


def test_random_sequences_of_calls_agree_with_the_model() -> None:
    RandomCalls.counts.clear()
    run(sequences=40, calls=40)
    assert RandomCalls.counts["cases"] >= 40
    assert RandomCalls.counts["refused calls"] > 40
