"""Runs golden trajectories of several ranks, in the process of one of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from golden_runs import RANK_CASES, make_optimizer, train
from problems import Problem
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


class ProblemModel(nn.Module):
    """The losses of a rank's part of a mini-batch, as the output of a module."""

    def __init__(self, problem: Problem, rows: list[np.ndarray]) -> None:
        super().__init__()
        self._problem = problem
        self._rows = rows
        self.weights = nn.ParameterList(problem.params)

    def forward(self, step: int) -> Tensor:
        return self._problem.losses(step, torch.as_tensor(self._rows[step - 1]))


class RankProblem(Problem):
    """A problem of which this process has a part of every mini-batch."""

    def __init__(self, name: str, dtype: torch.dtype, rank: int, ranks: int) -> None:
        super().__init__(name, dtype)
        rows = [np.array_split(np.arange(len(batch)), ranks)[rank] for batch in self.batches]
        self.model = DistributedDataParallel(ProblemModel(self, rows))

    def loss(self, step: int) -> Tensor:
        return self.model(step).mean()  # type: ignore[no-any-return]


def trajectories(
    rank: int, ranks: int, backends: list[str]
) -> dict[tuple[str, str, str, torch.dtype], np.ndarray]:
    """Run all cases of so many ranks: by scope, with every backend and in both precisions."""
    found = {}
    for case in RANK_CASES:
        if case["ranks"] != ranks:
            continue
        dtypes = (torch.float64, torch.float32)
        runs = [("local", backend, dtype) for backend in backends for dtype in dtypes]
        for scope, backend, dtype in [*runs, ("global", backends[0], torch.float64)]:
            problem = RankProblem(case["problem"], dtype, rank, ranks)
            optimizer: Any = make_optimizer(
                case, problem, backend, model=problem.model, perturb_scope=scope
            )
            found[case["name"], scope, backend, dtype] = train(case, problem, optimizer)
    return found
