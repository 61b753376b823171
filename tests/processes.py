"""Runs a function on several ranks of a gloo process group, within a time limit."""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Collection, Mapping
from datetime import timedelta
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


def _context() -> multiprocessing.context.ForkServerContext:
    multiprocessing.set_forkserver_preload(_PRELOADED)
    return multiprocessing.get_context("forkserver")


def run_apart(function: Callable[[], None], timeout: float = 120.0) -> None:
    """Call ``function``, importable by name, in a process of its own, which has to succeed.

    Args:
        function: What it does; an exception is a failure.
        timeout: Seconds until the process is killed, which is a failure.
    """
    process = _context().Process(target=function)
    process.start()
    process.join(timeout)
    late = process.is_alive()
    process.kill()
    process.join()
    assert not late, f"{function.__name__} had not ended after {timeout} s"
    assert process.exitcode == 0, "it failed; its error is in the captured output"


def run_ranks(
    function: Callable[..., Any],
    ranks: int,
    *args: Any,
    timeout: float = 120.0,
    group_timeout: float = 60.0,
    dying: Collection[int] = (),
    ends_together: bool = True,
) -> list[Any]:
    """Call ``function(rank, *args)`` in a process for each rank.

    Args:
        function: Importable by name.
        ranks: How many.
        args: Of the function.
        timeout: Seconds until the processes are killed, which is a failure.
        group_timeout: Seconds that a collective waits for the other ranks.
        dying: Ranks that end without a result.
        ends_together: Wait for the other ranks at the end; not where their group breaks.

    Returns:
        What the ranks returned; None for those that die.
    """
    context = _context()
    with tempfile.TemporaryDirectory() as folder:
        common = (function, ranks, args, folder, group_timeout, ends_together and not dying)
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
    ends_together: bool,
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
    if ends_together:
        dist.barrier()
    # Without the interpreter's own end: gloo's threads may be releasing Python objects, and abort
    # if it has begun (torch 2.13).
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


# ---- many cases in one process group: starting one takes longer than they do -------------------


def run_on_ranks(
    worker: Callable[..., Any], ranks: int, *args: Any, **options: Any
) -> list[dict[str, Any]]:
    """Return what ``worker(*args)`` returns on every rank; see :func:`run_ranks`."""
    return run_ranks(_without_rank, ranks, worker, args, **options)


def _without_rank(rank: int, worker: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    return worker(*args)


def results_of(cases: Mapping[str, Case]) -> dict[str, Any]:
    """Run many cases one after the other.

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
