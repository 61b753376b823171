"""The operations one by one: reduce, perturb and its undoing, and the tables they read."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from cases import BASES, LAYOUTS, METHODS, device_of, parameters, set_gradients, step
from tolerances import PERTURBED, REDUCTION, close

from wsam_fused import _extension
from wsam_fused.backends import BACKENDS
from wsam_fused.plan import ALIGNMENT, PointerTable, Slot, TableRow

AVAILABLE = [name for name, backend in BACKENDS.items() if backend.unavailable() is None]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])


@pytest.fixture(params=AVAILABLE)
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend that can be used on this machine; the parameters go to its device."""
    return str(request.param)


@DTYPES
@pytest.mark.parametrize("adaptive", [False, True], ids=["euclidean", "adaptive"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_reduce_is_the_sum_of_squares(
    layout: str, adaptive: bool, dtype: torch.dtype, backend: str
) -> None:
    params = parameters(layout, dtype, device_of(backend))
    set_gradients(params, 3)
    metric = [p.detach().double() ** 2 if adaptive else torch.ones(()) for p in params]
    squares = [p.grad.double() ** 2 for p in params]  # type: ignore[union-attr]
    expected = sum((m * s).sum() for m, s in zip(metric, squares, strict=True))
    optimizer = METHODS["sam"](params, BASES["sgd"], adaptive=adaptive, backend=backend)
    optimizer.first_step(zero_grad=True)
    scalars = optimizer._engine.primary.scalars
    close(scalars[Slot.METRIC_SQ], expected, REDUCTION[dtype], "metric")
    close(scalars[Slot.GRAD1_SQ], sum(s.sum() for s in squares), REDUCTION[dtype], "plain")
    close(
        optimizer.last.grad_norm or scalars[Slot.GRAD1_SQ].sqrt(),
        sum(s.sum() for s in squares).sqrt(),
        REDUCTION[dtype],
        "norm",
    )


@DTYPES
@pytest.mark.parametrize("adaptive", [False, True], ids=["euclidean", "adaptive"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_perturbation_has_the_radius_and_direction(
    layout: str, adaptive: bool, dtype: torch.dtype, backend: str
) -> None:
    params = parameters(layout, dtype, device_of(backend))
    set_gradients(params, 3)
    before = [p.detach().clone() for p in params]
    grads = [p.grad.double().clone() for p in params]  # type: ignore[union-attr]
    metric = [b.double() ** 2 if adaptive else torch.ones_like(b).double() for b in before]
    norm = sum((m * g * g).sum() for m, g in zip(metric, grads, strict=True)).sqrt()
    optimizer = METHODS["sam"](params, BASES["sgd"], rho=0.3, adaptive=adaptive, backend=backend)
    optimizer.first_step(zero_grad=True)
    for param, w, g, m in zip(params, before, grads, metric, strict=True):
        expected = (w.double() + 0.3 / (norm + 1e-12) * m * g).to(dtype)
        close(param.detach(), expected, PERTURBED[dtype], "perturbed parameter")


@DTYPES
@pytest.mark.parametrize("restore", ["recompute", "backup"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_restore_brings_the_weights_back(
    layout: str, restore: str, dtype: torch.dtype, backend: str
) -> None:
    params = parameters(layout, dtype, device_of(backend))
    set_gradients(params, 3)
    before = [p.detach().clone() for p in params]
    optimizer = METHODS["wsam"](params, BASES["sgd"], rho=0.3, restore=restore, backend=backend)
    optimizer.first_step(zero_grad=True)
    perturbed = [p.detach().clone() for p in params]
    assert not all(torch.equal(p, w) for p, w in zip(perturbed, before, strict=True))
    optimizer.restore()
    for param, w, p in zip(params, before, perturbed, strict=True):
        if restore == "backup":
            assert torch.equal(param, w)
        else:
            # p is off by d, half a unit in its last place at most; the way back rounds w + d to
            # the nearest number, and w is one that is |d| away: off by 2 |d| at most.
            unit = torch.finfo(dtype).eps * torch.maximum(p.abs(), w.abs())
            assert ((param - w).abs() <= unit).all()


@DTYPES
def test_adaptive_restore_is_exact(dtype: torch.dtype, backend: str) -> None:
    params = parameters("unaligned", dtype, device_of(backend))
    set_gradients(params, 3)
    before = [p.detach().clone() for p in params]
    optimizer = METHODS["sam"](params, BASES["sgd"], rho=2.0, adaptive=True, backend=backend)
    optimizer.first_step(zero_grad=True)
    optimizer.restore()
    assert all(torch.equal(p, w) for p, w in zip(params, before, strict=True))


def test_pointers_do_not_change(backend: str) -> None:
    params = parameters("unaligned", torch.float32, device_of(backend))
    optimizer = METHODS["sam"](params, BASES["adamw"], adaptive=True, backend=backend)
    step(optimizer, params, 0)
    addresses = [p.data_ptr() for p in params]
    states = [s.data_ptr() for p in params for s in optimizer.state[p].values()]
    step(optimizer, params, 1)
    assert addresses == [p.data_ptr() for p in params]
    assert states == [s.data_ptr() for p in params for s in optimizer.state[p].values()]


@pytest.mark.parametrize("chunk_size", [64, 128, 4096])
def test_chunks_cover_every_element_once(chunk_size: int) -> None:
    sizes = [1, 63, 64, 65, 1, 1, 1000, 5, 4096, 2]
    table = PointerTable(sizes, [0] * len(sizes), chunk_size, torch.device("cpu"))
    offsets = table.table[TableRow.OFFSET].tolist()
    assert all(offset % ALIGNMENT == 0 for offset in offsets)
    seen = [0] * len(sizes)
    for chunk, first in enumerate(table.chunks.tolist()):
        low, high = chunk * chunk_size, (chunk + 1) * chunk_size
        for tensor in range(first, len(sizes)):
            begin = max(low - offsets[tensor], 0)
            seen[tensor] += max(min(high - offsets[tensor], sizes[tensor]) - begin, 0)
        earlier = (offsets[t] + sizes[t] for t in range(first))
        assert all(end <= low for end in earlier), "a tensor before the first reaches in"
    assert seen == sizes


_DIGEST = """
import sys; sys.path.insert(0, {tests!r})
import hashlib, torch
from cases import BASES, METHODS, parameters, step
digest = hashlib.sha256()
for dtype in (torch.float32, torch.float64):
    for layout in ("sizes", "unaligned", "many-chunks"):
        for option in (dict(), dict(adaptive=True), dict(max_grad_norm=0.1)):
            torch.manual_seed(0)
            params = parameters(layout, dtype)
            optimizer = METHODS["wsam"](params, BASES["adamw"], rho=0.3, backend="cpu", **option)
            for number in range(2):
                step(optimizer, params, number)
            for param in params:
                digest.update(param.detach().contiguous().numpy().tobytes())
print(torch.ops.wsam_fused.cpu_isa(), digest.hexdigest())
"""


@pytest.mark.skipif(_extension.UNAVAILABLE is not None, reason=str(_extension.UNAVAILABLE))
def test_every_instruction_set_gives_the_same_bits() -> None:
    results = {}
    for name in ("baseline", "avx2", "avx512"):
        run = subprocess.run(
            [sys.executable, "-c", _DIGEST.format(tests=os.path.dirname(__file__))],
            env={**os.environ, "WSAM_FUSED_CPU_ISA": name},
            capture_output=True,
            text=True,
            check=True,
        )
        isa, digest = run.stdout.split()
        results[isa] = digest
    assert "0" in results, "the baseline was not asked for"
    assert len(set(results.values())) == 1, results
