"""What the two GPU backends have in common."""

from __future__ import annotations

from functools import cache

import torch

DTYPES: tuple[torch.dtype, ...] = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
)
# Lower dtypes that gradients are read in as they are; others are copied into the parameter's.
GRADIENT_DTYPES: dict[torch.dtype, tuple[torch.dtype, ...]] = {
    torch.float32: (torch.bfloat16, torch.float16)
}
# Ampere: the oldest architecture that the CUDA kernels are compiled for.
OLDEST_CAPABILITY = (8, 0)

# At least about so many chunks share the work of a list: 15 for each of the 528 blocks that an H100
# runs at once with 64 registers a thread, so that all finish at about the same time.
_CHUNKS = 8192
_SMALLEST_CHUNK, _LARGEST_CHUNK = 1024, 65536


def chunk_size(total: int) -> int:
    """Return the elements per chunk for a list of ``total`` elements.

    It depends on the list only: sums are formed per chunk, and are to be the same on every GPU.
    """
    size = _SMALLEST_CHUNK
    while size < _LARGEST_CHUNK and size * _CHUNKS < total:
        size *= 2
    return size


@cache
def too_old(device: torch.device) -> str | None:
    """Say that a GPU is older than the kernels support, or None."""
    found = torch.cuda.get_device_capability(device)
    if found >= OLDEST_CAPABILITY:
        return None
    wanted = ".".join(map(str, OLDEST_CAPABILITY))
    return f"its compute capability is {found[0]}.{found[1]}, expected {wanted} or newer"
