"""Mutants that survive because they change nothing that a user could see, and why."""

from __future__ import annotations

# (source, change) -> why
EXPLAINED: dict[tuple[str, str], str] = {}
