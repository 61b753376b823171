"""The experiments, in the order of the papers."""

from __future__ import annotations

from benchmarks.paper.experiment import Experiment

EXPERIMENTS: dict[str, Experiment] = {}
