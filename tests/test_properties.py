"""Invariants over random lists, hyper-parameters and base optimizers (hypothesis)."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from conftest import ON_CPU
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import ONE_STEP, close
from torch.optim import SGD, Adam, AdamW

from wsam_fused import SAM, WSAM

settings.register_profile("repeatable", max_examples=40, deadline=None, derandomize=True)
settings.load_profile("repeatable")

shapes = st.lists(
    st.lists(st.integers(0, 7), max_size=3).map(tuple), min_size=1, max_size=6
).filter(lambda list_: any(0 not in shape for shape in list_))
dtypes = st.sampled_from([torch.float32, torch.float64])
backends = st.sampled_from(ON_CPU)
rho = st.floats(0.0, 2.0)
gamma = st.floats(0.0, 0.95)
bases = st.sampled_from(
    [
        functools.partial(SGD, lr=0.05),
        functools.partial(SGD, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.1),
        functools.partial(SGD, lr=0.05, momentum=0.9, dampening=0.5),
        functools.partial(Adam, lr=0.01, weight_decay=0.1),
        functools.partial(AdamW, lr=0.01, amsgrad=True),
    ]
)


def tensors(shapes: list[tuple[int, ...]], dtype: torch.dtype, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]


def run(
    method: Any, shapes: list[tuple[int, ...]], dtype: torch.dtype, steps: int = 2, scale: float = 1
) -> list[torch.Tensor]:
    """Run ``method(params)`` with gradients that depend on the shapes only."""
    params = [torch.nn.Parameter(t) for t in tensors(shapes, dtype, 0)]
    optimizer = method(params)
    for number in range(steps):
        for evaluation, call in enumerate((optimizer.first_step, optimizer.second_step)):
            grads = tensors(shapes, dtype, 1 + 2 * number + evaluation)
            for param, grad in zip(params, grads, strict=True):
                param.grad = grad * scale
            call(zero_grad=True)
    return [param.detach() for param in params]


@given(shapes=shapes, dtype=dtypes, backend=backends, base=bases, rho=rho)
def test_coupled_wsam_with_gamma_one_half_is_sam(
    shapes: Any, dtype: torch.dtype, backend: str, base: Any, rho: float
) -> None:
    coupled = functools.partial(
        WSAM, base_optimizer=base, gamma=0.5, decouple=False, rho=rho, backend=backend
    )
    sam = functools.partial(SAM, base_optimizer=base, rho=rho, backend=backend)
    for a, b in zip(run(coupled, shapes, dtype), run(sam, shapes, dtype), strict=True):
        close(a, b, ONE_STEP[dtype], "coupled WSAM and SAM")


@given(shapes=shapes, dtype=dtypes, backend=backends, rho=rho, gamma=gamma)
def test_decoupled_is_coupled_over_plain_sgd(
    shapes: Any, dtype: torch.dtype, backend: str, rho: float, gamma: float
) -> None:
    both = [
        functools.partial(
            WSAM, base_optimizer=SGD, lr=0.05, rho=rho, gamma=gamma, decouple=d, backend=backend
        )
        for d in (True, False)
    ]
    for a, b in zip(*(run(m, shapes, dtype) for m in both), strict=True):
        close(a, b, ONE_STEP[dtype], "decoupled and coupled over SGD")


@given(shapes=shapes, dtype=dtypes, backend=backends, base=bases, gamma=gamma)
def test_permuting_the_list_changes_nothing_but_the_rounding_of_the_norm(
    shapes: Any, dtype: torch.dtype, backend: str, base: Any, gamma: float
) -> None:
    params = [[torch.nn.Parameter(t) for t in tensors(shapes, dtype, 0)] for _ in range(2)]
    for list_, order in zip(params, (1, -1), strict=True):
        optimizer = WSAM(list_[::order], base, gamma=gamma, backend=backend)
        for seed, call in ((1, optimizer.first_step), (2, optimizer.second_step)):
            for param, grad in zip(list_, tensors(shapes, dtype, seed), strict=True):
                param.grad = grad
            call(zero_grad=True)
    for a, b in zip(*params, strict=True):
        close(a.detach(), b.detach(), ONE_STEP[dtype], "permuted list")


@given(shapes=shapes, dtype=dtypes, backend=backends, exponent=st.integers(-20, 20))
def test_the_perturbation_does_not_depend_on_the_scale_of_the_loss(
    shapes: Any, dtype: torch.dtype, backend: str, exponent: int
) -> None:
    """Scaling by a power of two changes no bit of e where eps does not matter."""
    results = []
    for scale in (1.0, 2.0**exponent):
        params = [torch.nn.Parameter(t) for t in tensors(shapes, dtype, 0)]
        optimizer = SAM(params, SGD, lr=0.1, rho=0.5, eps=0.0, backend=backend)
        for param, grad in zip(params, tensors(shapes, dtype, 1), strict=True):
            param.grad = grad * scale
        optimizer.first_step(zero_grad=True)
        results.append([param.detach().clone() for param in params])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@given(
    shapes=shapes,
    dtype=dtypes,
    base=bases,
    rho=rho,
    gamma=gamma,
    adaptive=st.booleans(),
    decouple=st.booleans(),
    clip=st.sampled_from([None, 0.1, 100.0]),
    restore=st.sampled_from(["recompute", "backup"]),
)
@pytest.mark.parametrize("backend", [name for name in ON_CPU if name != "eager"])
def test_backends_agree_with_the_reference(
    backend: str, shapes: Any, dtype: torch.dtype, base: Any, clip: float | None, **options: Any
) -> None:
    results = [
        run(
            functools.partial(
                WSAM, base_optimizer=base, backend=name, max_grad_norm=clip, **options
            ),
            shapes,
            dtype,
            steps=1,
        )
        for name in (backend, "eager")
    ]
    for a, b in zip(*results, strict=True):
        # gamma <= 0.95 multiplies rounding by 19, the weights of ONE_STEP's derivation by 5.
        tolerance = ONE_STEP[dtype]._replace(atol=5 * ONE_STEP[dtype].atol)
        close(a, b, tolerance, "backend and reference")


@given(shapes=shapes, dtype=dtypes, backend=backends, rho=rho, adaptive=st.booleans())
def test_exact_restore_is_exact(
    shapes: Any, dtype: torch.dtype, backend: str, rho: float, adaptive: bool
) -> None:
    params = [torch.nn.Parameter(t) for t in tensors(shapes, dtype, 0)]
    optimizer = WSAM(
        params, SGD, lr=0.1, rho=rho, adaptive=adaptive, restore="backup", backend=backend
    )
    for param, grad in zip(params, tensors(shapes, dtype, 1), strict=True):
        param.grad = grad
    optimizer.first_step(zero_grad=True)
    optimizer.restore()
    for param, expected in zip(params, tensors(shapes, dtype, 0), strict=True):
        assert torch.equal(param, expected)
