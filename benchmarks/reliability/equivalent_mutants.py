"""Mutants that survive the quick tests because nobody could see a difference, and why."""

from __future__ import annotations

_SLOW = "tests/test_per_sample.py fails, which is not among the quick tests"

# (source or "*" for all, change) -> why
EXPLAINED: dict[tuple[str, str], str] = {
    ("*", "strict=True -> strict=False"): "the lists of a step are equally long",
    (
        "methods/rwsam.py",
        "'too coarse for the difference of two losses that RWSAM takes' -> "
        "'too coarse for the difference of two losses that RWSAM takes?'",
    ): "text of an error",
    ("methods/rwsam.py", "self._batch_norm.save() -> None"): _SLOW,
    ("methods/rwsam.py", "self._batch_norm.restore() -> None"): _SLOW,
    ("coefficients.py", "row.sign < 0 -> row.sign <= 0"): "a sign is 1 or -1",
    ("coefficients.py", "0 -> 1"): "a sign is 1 or -1",
}
