"""Whole steps: each backend against the reference, parameters and state after every step.

Both start every step from the same state, so that differences do not pile up: after a comparison
the reference's tensors are copied over.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from cases import BASES, FOREIGN_BASES, METHODS, OPTIONS, parameters, step
from tolerances import ONE_STEP, close

from wsam_fused.backends import BACKENDS

STEPS = 4
FUSED = [name for name, b in BACKENDS.items() if name != "eager" and b.unavailable() is None]
DTYPES = [torch.float32, torch.float64]


def compare_and_align(ours: Any, reference: Any, dtype: torch.dtype, what: str) -> None:
    pairs = zip(all_params(ours), all_params(reference), strict=True)
    for i, (param, expected) in enumerate(pairs):
        close(param.detach(), expected.detach(), ONE_STEP[dtype], f"{what}, parameter {i}")
        state, expected_state = ours.state[param], reference.state[expected]
        assert state.keys() == expected_state.keys()
        with torch.no_grad():
            param.copy_(expected)
            for key, value in state.items():
                if isinstance(value, torch.Tensor):
                    close(value, expected_state[key], ONE_STEP[dtype], f"{what}, {key} {i}")
                    value.copy_(expected_state[key])


def all_params(optimizer: Any) -> list[torch.nn.Parameter]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def run_both(
    method: Any, base: Any, layout: str, dtype: torch.dtype, backend: str, **kw: Any
) -> None:
    lists = []
    for _ in range(2):
        torch.manual_seed(1)
        lists.append(parameters(layout, dtype))
    ours = method(lists[0], base, backend=backend, **kw)
    reference = method(lists[1], base, backend="eager", **kw)
    before = [param.detach().clone() for param in lists[0]]
    for number in range(STEPS):
        step(ours, lists[0], number)
        step(reference, lists[1], number)
        compare_and_align(ours, reference, dtype, f"step {number}")
    moved = [not torch.equal(p, b) for p, b in zip(lists[0], before, strict=True) if p.numel()]
    assert all(moved), "the comparison would pass by doing nothing"


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
@pytest.mark.parametrize("base", [*BASES, *FOREIGN_BASES])
@pytest.mark.parametrize("method", METHODS)
def test_every_base_and_method(method: str, base: str, dtype: torch.dtype, name: str) -> None:
    bases = {**BASES, **FOREIGN_BASES}
    run_both(METHODS[method], bases[base], "sizes", dtype, name, **OPTIONS["plain"])


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
@pytest.mark.parametrize(
    ("base", "method", "option"),
    list(itertools.product(["sgdm", "adamw", "rmsprop"], ["sam", "wsam", "coupled"], OPTIONS)),
)
def test_every_option(base: str, method: str, option: str, dtype: torch.dtype, name: str) -> None:
    bases = {**BASES, **FOREIGN_BASES}
    run_both(METHODS[method], bases[base], "unaligned", dtype, name, **OPTIONS[option])


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
@pytest.mark.parametrize("option", ["plain", "adaptive"])
@pytest.mark.parametrize("layout", ["many-chunks", "strided", "tiny"])
def test_every_layout(layout: str, option: str, dtype: torch.dtype, name: str) -> None:
    run_both(METHODS["wsam"], BASES["adamw"], layout, dtype, name, **OPTIONS[option])


@pytest.mark.parametrize("name", FUSED)
def test_float32_and_float64_parameters_share_one_norm(name: str) -> None:
    results = []
    for backend in (name, "eager"):
        torch.manual_seed(1)
        params = [*parameters("unaligned", torch.float32), *parameters("sizes", torch.float64)]
        optimizer = METHODS["wsam"](params, BASES["sgdm"], rho=0.5, backend=backend)
        step(optimizer, params, 0)
        results.append([param.detach().double() for param in params])
    for ours, expected in zip(*results, strict=True):
        close(ours, expected, ONE_STEP[torch.float32], "mixed dtypes")


@pytest.mark.parametrize("name", FUSED)
def test_groups_with_values_of_their_own_share_one_launch(name: str) -> None:
    results = []
    for backend in (name, "eager"):
        torch.manual_seed(1)
        params = parameters("unaligned", torch.float64)
        groups = [
            {"params": params[:2], "lr": 0.1, "rho": 0.01, "gamma": 0.5, "weight_decay": 0.3},
            {"params": params[2:], "lr": 0.01, "rho": 1.0, "gamma": 0.95},
        ]
        optimizer = METHODS["wsam"](groups, BASES["adamw"], rho=0.5, backend=backend)
        for number in range(STEPS):
            step(optimizer, params, number)
        if backend == name:
            assert len(optimizer._engine.lists) == 1
        results.append([param.detach() for param in params])
    for ours, expected in zip(*results, strict=True):
        close(ours, expected, ONE_STEP[torch.float64], "groups")


@pytest.mark.parametrize("name", FUSED)
def test_result_does_not_depend_on_the_number_of_threads(name: str, threads: None) -> None:
    results = []
    for count in (1, 2, 3, 7):
        torch.set_num_threads(count)
        torch.manual_seed(1)
        params = [torch.nn.Parameter(torch.randn(300_001)), torch.nn.Parameter(torch.randn(70_000))]
        optimizer = METHODS["wsam"](
            params, BASES["adamw"], rho=0.5, max_grad_norm=0.1, backend=name
        )
        step(optimizer, params, 0)
        step(optimizer, params, 1)
        results.append(torch.cat([param.detach() for param in params]))
    for other in results[1:]:
        assert torch.equal(results[0], other)
