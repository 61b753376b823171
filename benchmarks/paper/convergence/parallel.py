"""Many small computations, in several processes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any, TypeVar

from threadpoolctl import threadpool_limits
from tqdm import tqdm

_Result = TypeVar("_Result")


def computed(
    function: Callable[..., _Result], tasks: Sequence[tuple[Any, ...]], workers: int, what: str
) -> list[_Result]:
    """Return the result of each task, in their order.

    Args:
        function: Given the members of a task; of a module, so that processes find it.
        tasks: Arguments.
        workers: Processes at the same time; 1 for none but this one.
        what: They are for, shown at the progress bar.
    """
    alone = functools.partial(_in_one_thread, function)
    bar = functools.partial(
        tqdm, total=len(tasks), desc=what, unit="run", disable=None, leave=False
    )
    if workers == 1:
        return list(bar(map(alone, tasks)))
    # Not forked: torch may have threads.
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        return list(bar(pool.map(alone, tasks)))


def _in_one_thread(function: Callable[..., _Result], task: tuple[Any, ...]) -> _Result:
    """The matrices are so small that threads wait longer for each other than they compute."""
    with threadpool_limits(1):
        return function(*task)
