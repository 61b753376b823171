"""Two optimizers in two threads of Python, whose kernels run at the same time, without the GIL."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
from cases import BASES, METHODS, parameters, step

STEPS = 5


def train(seed: int) -> list[torch.Tensor]:
    """Step an optimizer of this thread's own; 16 bits by chance goes through the most code."""
    found = []
    for dtype, options in (
        (torch.float32, {"geometry": "adaptive"}),
        (torch.bfloat16, {"stochastic_rounding": True, "state_dtype": "parameter"}),
    ):
        params = parameters("many-chunks", dtype)
        with torch.no_grad():
            for index, param in enumerate(params):
                param.copy_(torch.linspace(-1, 1 + index + seed, param.numel()))
        optimizer = METHODS["wsam"](params, BASES["adamw"], backend="cpu", **options)
        for number in range(STEPS):
            step(optimizer, params, 10 * seed + number)
        found += [param.detach() for param in params]
    return found


def test_each_gets_what_it_gets_alone() -> None:
    torch.set_num_threads(1)
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(train, (0, 1)))
    alone = [train(0), train(1)]
    for ours, expected in zip(together, alone, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
    assert not torch.equal(together[0][0], together[1][0])
