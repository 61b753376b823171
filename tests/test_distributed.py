"""DistributedDataParallel: two processes on half a batch each equal one process on all of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from wsam_fused import WSAM

RANKS = 2


def train(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    optimizer = WSAM(model.parameters(), torch.optim.AdamW, lr=0.01, rho=0.3)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(model(x), y)
        loss.backward()
        return loss

    for _ in range(4):
        optimizer.step(closure)
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def problem() -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 9), torch.nn.Tanh(), torch.nn.Linear(9, 2))
    return model.double(), torch.randn(8, 5).double(), torch.randn(8, 2).double()


def worker(rank: int, store: str, as_views: bool, results: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    model, x, y = problem()
    parallel = DistributedDataParallel(model, gradient_as_bucket_view=as_views)
    results[rank] = train(parallel, x.chunk(RANKS)[rank], y.chunk(RANKS)[rank]).tolist()
    dist.destroy_process_group()


@pytest.mark.parametrize("as_views", [False, True], ids=["copies", "bucket-views"])
def test_data_parallel_equals_one_process(as_views: bool, tmp_path: Path) -> None:
    """Bucket views are overwritten by the second backward, so that g1 must have been copied."""
    results = torch.multiprocessing.get_context("spawn").Manager().dict()
    torch.multiprocessing.spawn(
        worker, args=(str(tmp_path / "store"), as_views, results), nprocs=RANKS
    )
    expected = train(*problem())
    for rank in range(RANKS):
        found = torch.tensor(results[rank], dtype=torch.float64)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
