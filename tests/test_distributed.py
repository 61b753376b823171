"""DistributedDataParallel: two processes on half a batch each equal one process on all of it."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
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


def worker(rank: int, store: str, as_views: bool, method: str, parts: int, results: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    model, x, y = problem()
    parallel = DistributedDataParallel(model, gradient_as_bucket_view=as_views)
    # Every rank takes its share of every micro-batch.
    x, y = (torch.cat([t.chunk(RANKS)[rank] for t in whole.chunk(parts)]) for whole in (x, y))
    results[rank] = train(parallel, x, y, method, parts).tolist()
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("as_views", "method", "parts"),
    [
        (False, "wsam", 1),
        (True, "wsam", 1),
        (False, "gsam", 1),
        (False, "sam", 2),
        (True, "wsam", 2),
        (True, "gsam", 2),
    ],
)
def test_data_parallel_equals_one_process(
    as_views: bool, method: str, parts: int, tmp_path: Path
) -> None:
    """Bucket views are overwritten by the second backward, so that g1 must have been copied."""
    results = torch.multiprocessing.get_context("spawn").Manager().dict()
    torch.multiprocessing.spawn(
        worker, args=(str(tmp_path / "store"), as_views, method, parts, results), nprocs=RANKS
    )
    expected = train(*problem(), method, parts)
    for rank in range(RANKS):
        found = torch.tensor(results[rank], dtype=torch.float64)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
