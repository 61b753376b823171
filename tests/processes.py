"""Runs a function on several ranks of a gloo process group, within a time limit."""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Collection
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def run_ranks(
    function: Callable[..., Any],
    ranks: int,
    *args: Any,
    timeout: float = 120.0,
    group_timeout: float = 60.0,
    dying: Collection[int] = (),
) -> list[Any]:
    """Call ``function(rank, *args)`` in a process for each rank.

    Args:
        function: Importable by name.
        ranks: How many.
        args: Of the function.
        timeout: Seconds until the processes are killed, which is a failure.
        group_timeout: Seconds that a collective waits for the other ranks.
        dying: Ranks that end without a result.

    Returns:
        What the ranks returned; None for those that die.
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        common = (function, ranks, args, folder, group_timeout, bool(dying))
        processes = [context.Process(target=_rank, args=(rank, *common)) for rank in range(ranks)]
        for process in processes:
            process.start()
        end = time.monotonic() + timeout
        for process in processes:
            process.join(max(0.0, end - time.monotonic()))
        late = [rank for rank, process in enumerate(processes) if process.is_alive()]
        for process in processes:
            process.kill()
            process.join()
        assert not late, f"ranks {late} had not ended after {timeout} s"
        failed = [r for r, p in enumerate(processes) if p.exitcode != 0 and r not in dying]
        assert not failed, f"ranks {failed} failed; their errors are in the captured output"
        return [
            None
            if rank in dying
            else torch.load(Path(folder) / f"result{rank}", weights_only=False)
            for rank in range(ranks)
        ]


def _rank(
    rank: int,
    function: Callable[..., Any],
    ranks: int,
    args: tuple[Any, ...],
    folder: str,
    group_timeout: float,
    others_die: bool,
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=group_timeout),
    )
    torch.save(function(rank, *args), Path(folder) / f"result{rank}")
    if not others_die:
        dist.barrier()
    # Without the interpreter's own end: gloo's threads may be releasing Python objects, and abort
    # if it has begun (torch 2.13).
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
