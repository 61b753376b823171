"""Keeps a second thread out of a step in progress."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any


def in_one_thread(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let a method of an optimizer refuse to run while another thread is in one of them.

    A step moves the weights away and back. A second thread in the middle of it would take gradients
    of weights that are elsewhere, and its error would put them back under the first one's hands.
    Threads may use an optimizer one after the other, and a method may call others.

    Args:
        function: The method. All methods of one object that went through this exclude each other.

    Returns:
        The method, which raises RuntimeError before it changes anything.
    """

    @functools.wraps(function)
    def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        # An instance made by a copy has none; setdefault() lets one of two threads make it.
        lock = self.__dict__.setdefault("_step_lock", threading.RLock())
        if not lock.acquire(blocking=False):
            raise RuntimeError(
                f"{function.__name__}() was called in thread {threading.current_thread().name!r} "
                f"while another thread is in a step of this {type(self).__name__}; put a lock "
                "around whole steps, or give each thread an optimizer and parameters of its own"
            )
        try:
            return function(self, *args, **kwargs)
        finally:
            lock.release()

    return checked
