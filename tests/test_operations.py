"""The operations one by one: reduce, perturb and its undoing, and the tables they read."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import BASES, LAYOUTS, METHODS, call, device_of, parameters, set_gradients, step
from tolerances import PERTURBED, REDUCTION, close
from torch import Tensor

from wsam_fused import RWSAM, _extension
from wsam_fused.backends import BACKENDS
from wsam_fused.plan import ALIGNMENT, PointerTable, Slot, TableRow

AVAILABLE = [name for name, backend in BACKENDS.items() if backend.unavailable() is None]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])


@pytest.fixture(params=AVAILABLE)
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend that can be used on this machine; the parameters go to its device."""
    return str(request.param)


GEOMETRIES: dict[str, tuple[dict[str, Any], Callable[[Tensor, Tensor], Tensor]]] = {
    "euclidean": ({}, lambda w, g: torch.ones_like(g)),
    "adaptive": ({"adaptive": True}, lambda w, g: w**2),
    "asam": ({"geometry": "adaptive", "eta": 0.3}, lambda w, g: (w.abs() + 0.3) ** 2),
    "fisher": ({"geometry": "fisher", "eta": 0.7}, lambda w, g: 1 / (1 + 0.7 * g * g)),
}


def copies(
    params: list[torch.nn.Parameter],
) -> tuple[list[Tensor], list[Tensor]]:
    """Weights and gradients in float64."""
    weights = [param.detach().double().clone() for param in params]
    return weights, [param.grad.double().clone() for param in params]  # type: ignore[union-attr]


def metrics(geometry: str, weights: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    return [GEOMETRIES[geometry][1](w, g) for w, g in zip(weights, grads, strict=True)]


def total(*lists: list[Tensor]) -> Tensor:
    """Sum over all elements of the products."""
    sums = [math.prod(tensors).sum() for tensors in zip(*lists, strict=True)]  # type: ignore[attr-defined]
    return torch.stack(sums).sum()


@DTYPES
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_reduce_is_the_sum_of_squares(
    layout: str, geometry: str, dtype: torch.dtype, backend: str
) -> None:
    params = parameters(layout, dtype, device_of(backend))
    set_gradients(params, 3)
    weights, grads = copies(params)
    options = GEOMETRIES[geometry][0]
    optimizer = METHODS["sam"](params, BASES["sgd"], backend=backend, **options)
    optimizer.first_step(zero_grad=True)
    scalars = optimizer._engine.scalars
    expected = total(metrics(geometry, weights, grads), grads, grads)
    close(scalars[Slot.METRIC_SQ], expected, REDUCTION[dtype], "metric")
    close(scalars[Slot.GRAD1_SQ], total(grads, grads), REDUCTION[dtype], "plain")


@DTYPES
@pytest.mark.parametrize("layout", LAYOUTS)
def test_reduce_of_later_gradients_and_their_product_with_the_first(
    layout: str, dtype: torch.dtype, backend: str
) -> None:
    params = parameters(layout, dtype, device_of(backend))
    optimizer = METHODS["bsam"](params, BASES["sgd"], backend=backend)
    lists = []
    for evaluation in range(2):
        set_gradients(params, evaluation)
        lists.append(copies(params)[1])
        call(optimizer, evaluation)
    set_gradients(params, 2)
    lists.append(copies(params)[1])
    engine = optimizer._engine
    engine.read_next()
    engine.reduce(1, with_first=True)
    engine.reduce(2)
    optimizer.restore()
    scalars = engine.scalars
    close(scalars[Slot.GRAD2_SQ], total(lists[1], lists[1]), REDUCTION[dtype], "second")
    close(scalars[Slot.GRAD3_SQ], total(lists[2], lists[2]), REDUCTION[dtype], "third")
    # The terms of the product cancel: absolute, in units of what their squares add up to.
    norms = (total(lists[0], lists[0]) * total(lists[1], lists[1])).sqrt()
    found = scalars[Slot.DOT12] / norms
    expected = total(lists[0], lists[1]) / norms
    close(found, expected, REDUCTION[dtype]._replace(atol=1e-12), "product")


def test_reduce_of_a_product_leaves_out_tensors_without_a_first_gradient(backend: str) -> None:
    params = parameters("unaligned", torch.float64, device_of(backend))
    optimizer = METHODS["gsam"](params, BASES["sgd"], backend=backend)
    set_gradients(params, 0)
    params[1].grad = None
    first = [param.grad for param in params]
    optimizer.first_step(zero_grad=True)
    set_gradients(params, 1)
    second = [param.grad for param in params]
    both = [i for i, grad in enumerate(first) if grad is not None]
    optimizer.second_step()
    scalars = optimizer._engine.scalars
    pairs = [(first[i], second[i]) for i in both]
    expected = sum((a * b).sum() for a, b in pairs)  # type: ignore[operator]
    close(scalars[Slot.DOT12], expected, REDUCTION[torch.float64], "product")  # type: ignore[arg-type]
    squares = sum((b * b).sum() for _, b in pairs)  # type: ignore[operator]
    close(scalars[Slot.GRAD2_SQ], squares, REDUCTION[torch.float64], "second")  # type: ignore[arg-type]


@DTYPES
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_points_have_the_radius_and_direction(
    layout: str, geometry: str, dtype: torch.dtype, backend: str
) -> None:
    params = parameters(layout, dtype, device_of(backend))
    set_gradients(params, 3)
    weights, grads = copies(params)
    metric = metrics(geometry, weights, grads)
    norm = total(metric, grads, grads).sqrt()
    options = {"rho": 0.3, "rho_min": 0.2, **GEOMETRIES[geometry][0]}
    optimizer = METHODS["bsam"](params, BASES["sgd"], backend=backend, **options)
    for evaluation, radius in enumerate((0.3, -0.2)):
        call(optimizer, evaluation)
        for param, w, g, m in zip(params, weights, grads, metric, strict=True):
            expected = (w + radius / (norm + 1e-12) * m * g).to(dtype)
            close(param.detach(), expected, PERTURBED[dtype], f"at radius {radius}")
        set_gradients(params, 4)
    optimizer.restore()


@DTYPES
@pytest.mark.parametrize("layout", LAYOUTS)
def test_noise_is_that_of_the_reference_and_leaves_nothing_behind(
    layout: str, dtype: torch.dtype, backend: str
) -> None:
    lists = []
    for name in (backend, "eager"):
        torch.manual_seed(1)
        params = parameters(layout, dtype, device_of(backend))
        before = [param.detach().clone() for param in params]
        optimizer = RWSAM(params, BASES["sgd"], delta=2.0**-6, backend=name)
        engine = optimizer._begin_without_gradients()
        with torch.no_grad():
            engine.probe(2**40 + 12345)
            lists.append([param.detach().clone() for param in params])
            engine.return_to_weights()
        assert all(torch.equal(p, w) for p, w in zip(params, before, strict=True))
    assert all(torch.equal(p, expected) for p, expected in zip(*lists, strict=True))
    moves = torch.cat([(p - w).flatten() for p, w in zip(lists[0], before, strict=True)])
    share = (moves > 0).double().mean().item()
    assert abs(share - 0.5) < 4 * 0.5 / moves.numel() ** 0.5


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
    table = PointerTable(sizes, [0] * len(sizes), [0] * len(sizes), chunk_size, torch.device("cpu"))
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
        for method, option in (
            ("wsam", dict()),
            ("wsam", dict(adaptive=True)),
            ("wsam", dict(max_grad_norm=0.1)),
            ("gsam", dict(geometry="fisher")),
            ("bsam", dict(geometry="adaptive")),
        ):
            torch.manual_seed(0)
            params = parameters(layout, dtype)
            optimizer = METHODS[method](params, BASES["adamw"], rho=0.3, backend="cpu", **option)
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
