"""Runs a function in several processes that form a process group (gloo, one thread each)."""

from __future__ import annotations

import datetime
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# A process that waits for another one gives up after this, and so does the test soon after.
COLLECTIVE_SECONDS = 20
Case = Callable[[], Any]


def run_on_ranks(
    worker: Callable[..., Any], world: int, folder: Path, *args: Any, seconds: float = 120
) -> list[Any]:
    """Return what ``worker(*args)`` returns on every rank.

    Raises:
        Exception: What a worker raised (``ProcessRaisedException``).
        TimeoutError: They take longer than ``seconds``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    context = torch.multiprocessing.spawn(
        _work, args=(world, str(folder), worker, args), nprocs=world, join=False
    )
    end = time.monotonic() + seconds
    while not context.join(timeout=1):
        if time.monotonic() > end:
            for process in context.processes:
                process.kill()
            raise TimeoutError(f"{worker} on {world} ranks took over {seconds} seconds")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]


def _work(rank: int, world: int, folder: str, worker: Callable[..., Any], args: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=COLLECTIVE_SECONDS),
    )
    try:
        torch.save(worker(*args), Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


def results_of(cases: Mapping[str, Case]) -> dict[str, Any]:
    """Run many cases in one process group: starting one takes longer than they do.

    Returns:
        The result of every case, or the text of what it raised.
    """
    found: dict[str, Any] = {}
    for name, case in cases.items():
        torch.manual_seed(0)
        try:
            found[name] = case()
        except Exception:
            found[name] = Failure(traceback.format_exc())
    return found


class Failure:
    """What a case raised.

    Args:
        text: The traceback.
    """

    def __init__(self, text: str) -> None:
        self.text = text


def result(ranks: list[dict[str, Any]], case: str) -> list[Any]:
    """Return the results of one case on every rank.

    Raises:
        AssertionError: It raised on some rank.
    """
    found = [results[case] for results in ranks]
    failed = [f"rank {i}: {r.text}" for i, r in enumerate(found) if isinstance(r, Failure)]
    assert not failed, "\n".join(failed)
    return found
