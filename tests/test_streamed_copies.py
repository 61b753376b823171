"""Lists so large that the CPU kernels write copies of w past the cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import BASES, METHODS, OPTIONS
from comparison import step_both

from wsam_fused import RWSAM, _extension

STREAMED_BYTES = 32 * 2**20  # kStreamedBytes in csrc/cpu/stream.h

pytestmark = pytest.mark.skipif(
    _extension.UNAVAILABLE is not None, reason=str(_extension.UNAVAILABLE)
)


def large(dtype: torch.dtype) -> list[torch.nn.Parameter]:
    """A little more than what is streamed; one of them begins at an odd place."""
    torch.manual_seed(1)
    half = STREAMED_BYTES // dtype.itemsize // 2
    block = torch.randn(half + 9, dtype=dtype)
    tensors = [torch.randn(half - 1001, dtype=dtype), torch.randn(5, dtype=dtype), block[3:-1]]
    tensors.append(torch.randn(37, 41, dtype=dtype))
    assert sum(t.numel() * t.element_size() for t in tensors) >= STREAMED_BYTES
    return [torch.nn.Parameter(tensor) for tensor in tensors]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("option", ["adaptive", "fisher", "backup"])
def test_a_step_equals_that_of_the_reference(option: str, dtype: torch.dtype) -> None:
    ours, reference = (
        METHODS["wsam"](large(dtype), BASES["sgdm"], backend=backend, **OPTIONS[option])
        for backend in ("cpu", "eager")
    )
    step_both(ours, reference, dtype, 0)


@pytest.mark.parametrize("options", [{"geometry": "adaptive"}, {"restore": "backup"}])
def test_restore_is_exact(options: dict[str, Any]) -> None:
    params = large(torch.float32)
    before = [param.detach().clone() for param in params]
    optimizer = METHODS["wsam"](params, BASES["sgdm"], rho=1.0, backend="cpu", **options)
    for param in params:
        param.grad = torch.randn_like(param)
    optimizer.first_step(zero_grad=True)
    assert not any(torch.equal(p, w) for p, w in zip(params, before, strict=True))
    optimizer.restore()
    assert all(torch.equal(p, w) for p, w in zip(params, before, strict=True))


def test_noise_and_back() -> None:
    params = large(torch.float32)
    before = [param.detach().clone() for param in params]
    optimizer = RWSAM(params, BASES["sgdm"], backend="cpu")
    engine = optimizer._begin_without_gradients()
    engine.probe(7)
    moves = [((p - w).detach() / 1e-3).abs() for p, w in zip(params, before, strict=True)]
    assert all(torch.allclose(move, torch.ones_like(move), atol=1e-3) for move in moves)
    engine.return_to_weights()
    assert all(torch.equal(p, w) for p, w in zip(params, before, strict=True))
