"""The experiments, in the order of the papers."""

from __future__ import annotations

from benchmarks.paper import accuracy

EXPERIMENTS = {module.EXPERIMENT.name: module.EXPERIMENT for module in (accuracy,)}
