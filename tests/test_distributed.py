"""DistributedDataParallel: two processes on half a batch each equal one process on all of it."""

from __future__ import annotations

import functools

import torch
from processes import run_ranks
from tolerances import REPLICAS, close
from torch.nn.parallel import DistributedDataParallel

from wsam_fused import GSAM, SAM, WSAM

RANKS = 2


METHODS = {"sam": SAM, "wsam": WSAM, "gsam": GSAM}


def train(
    model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor, method: str, parts: int
) -> torch.Tensor:
    """Make steps, with micro-batches if there is more than one part."""
    optimizer = METHODS[method](
        model.parameters(), torch.optim.AdamW, lr=0.01, rho=0.3, every=2 if parts > 1 else 1
    )

    def closure(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if parts == 1:
            optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(model(x), y)
        loss.backward()
        return loss

    pieces = zip(x.chunk(parts), y.chunk(parts), strict=True)
    closures = [functools.partial(closure, *piece) for piece in pieces]
    for _ in range(4):
        optimizer.step(closures if parts > 1 else closures[0])
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def problem() -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 9), torch.nn.Tanh(), torch.nn.Linear(9, 2))
    return model.double(), torch.randn(8, 5).double(), torch.randn(8, 2).double()


def worker(rank: int, cases: list[tuple[bool, str, int]]) -> list[torch.Tensor]:
    found = []
    for as_views, method, parts in cases:
        model, x, y = problem()
        parallel = DistributedDataParallel(model, gradient_as_bucket_view=as_views)
        # Every rank takes its share of every micro-batch.
        x, y = (torch.cat([t.chunk(RANKS)[rank] for t in whole.chunk(parts)]) for whole in (x, y))
        found.append(train(parallel, x, y, method, parts))
    return found


def test_data_parallel_equals_one_process() -> None:
    """Bucket views are overwritten by the second backward, so that g1 must have been copied."""
    cases = [
        (False, "wsam", 1),
        (True, "wsam", 1),
        (False, "gsam", 1),
        (False, "sam", 2),
        (True, "wsam", 2),
        (True, "gsam", 2),
    ]
    results = run_ranks(worker, RANKS, cases)
    for number, (_, method, parts) in enumerate(cases):
        expected = train(*problem(), method, parts)
        for found in results:
            close(found[number], expected, REPLICAS, f"{method}, {parts} parts")
