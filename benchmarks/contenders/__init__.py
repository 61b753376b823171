"""The implementations that are compared, by name."""

from __future__ import annotations

from benchmarks.contenders.authors import Authors, AuthorsFused
from benchmarks.contenders.compiled import ForeachCompiled
from benchmarks.contenders.contender import BASES, Base, Contender
from benchmarks.contenders.foreach import Foreach, ForeachNoSync
from benchmarks.contenders.libraries import (
    Ours,
    OursCuda,
    OursEager,
    OursTriton,
    Plain,
    PytorchOptimizer,
    PytorchOptimizerForeach,
)

CONTENDERS: dict[str, type[Contender]] = {
    contender.name: contender
    for contender in (
        Authors,
        AuthorsFused,
        PytorchOptimizer,
        PytorchOptimizerForeach,
        Foreach,
        ForeachCompiled,
        Ours,
        Plain,
    )
}

# Those of the GPU report; the last is what a run without a GPU has in place of `cuda`.
GPU_CONTENDERS: dict[str, type[Contender]] = {
    contender.name: contender
    for contender in (Authors, ForeachNoSync, ForeachCompiled, OursCuda, OursTriton, Plain, Ours)
}

__all__ = [
    "BASES",
    "CONTENDERS",
    "GPU_CONTENDERS",
    "Base",
    "Contender",
    "ForeachCompiled",
    "Ours",
    "OursCuda",
    "OursEager",
    "OursTriton",
    "Plain",
]
