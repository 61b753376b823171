"""The implementations that are compared, by name."""

from __future__ import annotations

from benchmarks.contenders.authors import Authors, AuthorsFused
from benchmarks.contenders.compiled import ForeachCompiled
from benchmarks.contenders.contender import BASES, Base, Contender
from benchmarks.contenders.foreach import Foreach
from benchmarks.contenders.libraries import (
    Ours,
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

__all__ = ["BASES", "CONTENDERS", "Base", "Contender", "ForeachCompiled", "Ours", "Plain"]
