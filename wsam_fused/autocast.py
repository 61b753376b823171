"""What autocast remembers of the weights."""

from __future__ import annotations

import torch


def forget_casts() -> None:
    """Let autocast cast the weights again.

    Inside its context it keeps the 16-bit copies of the first forward, whatever happens to the
    weights; and those of a forward without gradient have no graph for the next one.
    """
    if torch.is_autocast_cache_enabled():
        torch.clear_autocast_cache()
