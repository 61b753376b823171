"""Makes changes that belong together so that no signal comes between them."""

from __future__ import annotations

import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from operator import methodcaller
from types import FrameType

Change = Callable[[], object]

_call = methodcaller("__call__")


def make_together(changes: Iterable[Change]) -> None:
    """Call all ``changes`` in one call of the interpreter.

    Python looks for signals between its own instructions, and here there are none: what raises in a
    signal's handler (KeyboardInterrupt, a time limit) does so before the first change or after the
    last. That holds for changes that are no Python functions, ``functools.partial`` of an operator
    for instance.

    Args:
        changes: None of them may fail; what can has to be done before.
    """
    deque(map(_call, changes), maxlen=0)


@contextmanager
def interrupts_deferred() -> Iterator[None]:
    """Let Ctrl-C wait until a block of Python code is over; a second one is heeded at once.

    Only SIGINT, and only in the main thread, where Python handles signals. It makes two system
    calls: for blocks that take longer than these.
    """
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    waiting: list[tuple[int, FrameType | None]] = []

    def defer(number: int, frame: FrameType | None) -> None:
        waiting.append((number, frame))
        if len(waiting) > 1:
            waiting.clear()
            handler(number, frame)

    signal.signal(signal.SIGINT, defer)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if waiting:
            handler(*waiting[0])
