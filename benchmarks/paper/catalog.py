"""The experiments, in the order of the papers."""

from __future__ import annotations

from benchmarks.paper import (
    ablation,
    accuracy,
    agreement,
    convergence,
    finetune,
    geometry,
    label_noise,
    m_sharpness,
    minima,
    sensitivity,
    toy,
)

_MODULES = (
    toy,
    accuracy,
    label_noise,
    geometry,
    ablation,
    minima,
    sensitivity,
    finetune,
    convergence,
    m_sharpness,
    agreement,
)
EXPERIMENTS = {module.EXPERIMENT.name: module.EXPERIMENT for module in _MODULES}
