"""The CUDA kernels with threads and blocks in other orders: a barrier that is missing shows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import emulated
import pytest
import torch
from cases import BASES, KEEPING, METHODS, parameters, set_gradients, step
from emulated import EmulatedBackend
from torch import Tensor

pytestmark = pytest.mark.skipif(emulated.build() is not None, reason=str(emulated.build()))
NAME = "cuda-emulated"
# First to last, last to first, and some at random.
SEEDS = range(6)


@pytest.fixture(autouse=True)
def _usual_order() -> Iterator[None]:
    yield
    torch.ops.wsam_fused_emulated.set_seed(0)


def results(
    seed: int, layout: str, base: str, dtype: torch.dtype = torch.float32, **options: Any
) -> list[Tensor]:
    """Parameters, states and norms after two steps, one of which is undone in between."""
    torch.ops.wsam_fused_emulated.set_seed(seed)
    torch.manual_seed(0)
    params = parameters(layout, dtype)
    optimizer = METHODS["wsam"](params, BASES[base], rho=0.5, backend=NAME, **options)
    step(optimizer, params, 0)
    set_gradients(params, 5)
    optimizer.first_step(zero_grad=True)
    optimizer.restore()
    step(optimizer, params, 1)
    flags = optimizer._engine.lists.lists[0].flags
    assert flags.tolist() == [0.0, 0.0], "the counter of the blocks is not back at 0"
    states = [value for p in params for value in optimizer.state[p].values()]
    return [*[p.detach() for p in params], *states, optimizer._engine.scalars]


@pytest.mark.parametrize(
    ("layout", "chunk_size"),
    [("many-chunks", 1024), ("sizes", 1024), ("tiny", 16_384)],
    ids=["one-tensor", "some-tensors", "several-windows"],
)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"adaptive": True},
        {"restore": "backup", "max_grad_norm": 0.5},
        {"dtype": torch.bfloat16, "adaptive": True, **KEEPING["master-narrow"]},
        {"dtype": torch.bfloat16, **KEEPING["chance-narrow"]},
    ],
    ids=["plain", "adaptive", "backup-clip", "master-narrow", "chance-narrow"],
)
@pytest.mark.parametrize("base", ["nesterov", "amsgrad"])
def test_the_order_of_threads_and_blocks_changes_no_bit(
    base: str,
    options: dict[str, Any],
    layout: str,
    chunk_size: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Over chunks of one tensor, of some, and of so many that several windows see them."""
    monkeypatch.setattr(EmulatedBackend, "chunk_size", lambda self, total: chunk_size)
    first, *others = [results(seed, layout, base, **options) for seed in SEEDS]
    for other in others:
        for ours, expected in zip(other, first, strict=True):
            assert torch.equal(ours, expected)


def received(seed: int, barriers: int) -> list[int]:
    torch.ops.wsam_fused_emulated.set_seed(seed)
    found: list[int] = torch.ops.wsam_fused_emulated.pass_on(barriers)
    return found


def test_the_emulation_finds_a_missing_barrier() -> None:
    blocks = [
        [1000 + 256 * block + (thread + 1) % 256 for thread in range(256)] for block in range(3)
    ]
    right = [number for block in blocks for number in block]
    assert all(received(seed, 1) == right for seed in SEEDS)
    wrong = [received(seed, 0) for seed in SEEDS]
    assert right not in wrong
    assert wrong[0] != wrong[1]


def test_the_emulation_finds_a_barrier_that_not_all_reach() -> None:
    for seed in SEEDS:
        with pytest.raises(RuntimeError, match="not all threads of a block reach a barrier"):
            received(seed, 2)
        assert received(seed, 1)[0] == 1001, "the next kernel is not disturbed"
