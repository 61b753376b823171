"""Runs a function in several processes that form a process group (gloo, one thread each)."""

from __future__ import annotations

import datetime
import multiprocessing
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

# One process imports these, which takes longer than most tests, and the others are forks of it.
_PRELOADED = [
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "wsam_fused",
]
Case = Callable[[], Any]


def run_on_ranks(
    worker: Callable[..., Any],
    world: int,
    folder: Path,
    *args: Any,
    seconds: float = 120,
    collective_seconds: float = 20,
) -> list[Any]:
    """Return what ``worker(*args)`` returns on every rank.

    Args:
        worker: A function of a module.
        world: How many ranks.
        folder: For their files.
        args: Of the worker.
        seconds: How long they may take in all.
        collective_seconds: How long one of them waits for another one.

    Raises:
        Exception: What a worker raised (``ProcessRaisedException``).
        TimeoutError: They take longer than ``seconds``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    multiprocessing.set_forkserver_preload(_PRELOADED)
    context = torch.multiprocessing.start_processes(
        _work,
        args=(world, str(folder), collective_seconds, worker, args),
        nprocs=world,
        join=False,
        start_method="forkserver",
    )
    end = time.monotonic() + seconds
    while not context.join(timeout=1):
        if time.monotonic() > end:
            for process in context.processes:
                process.kill()
            raise TimeoutError(f"{worker} on {world} ranks took over {seconds} seconds")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]


def _work(
    rank: int, world: int, folder: str, seconds: float, worker: Callable[..., Any], args: Any
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=seconds),
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
        except (Exception, pytest.fail.Exception):
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
