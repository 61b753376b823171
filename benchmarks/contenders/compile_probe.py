"""Compile one case and print the seconds it took; run by ``compiled.probe``."""

from __future__ import annotations

import json
import sys
import time

import torch

from benchmarks.common import shapes_of
from benchmarks.contenders.compiled import ForeachCompiled
from benchmarks.contenders.contender import BASES
from benchmarks.harness import Problem


def main(shapes: str, base: str, device: str, dtype: str) -> None:
    """Make one step."""
    problem = Problem(shapes_of(shapes), device=device, dtype=getattr(torch, dtype))
    contender = ForeachCompiled(problem.params, BASES[base])
    start = time.perf_counter()
    problem.step(contender)
    if device != "cpu":
        torch.accelerator.synchronize()
    print(json.dumps({"seconds": time.perf_counter() - start}))


if __name__ == "__main__":
    main(*sys.argv[1:])
