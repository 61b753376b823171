"""Whole steps: each backend against the reference, over bases, methods, options and layouts."""

from __future__ import annotations

import itertools

import pytest
import torch
from cases import BASES, FOREIGN_BASES, METHODS, OPTIONS, device_of, parameters, step
from comparison import STEPS, run_both
from tolerances import ONE_STEP, close

from wsam_fused.backends import BACKENDS

FUSED = [name for name, b in BACKENDS.items() if name != "eager" and b.unavailable() is None]
DTYPES = [torch.float32, torch.float64]


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
@pytest.mark.parametrize("geometry", ["plain", "asam", "fisher"])
@pytest.mark.parametrize("base", [*BASES, *FOREIGN_BASES])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_base_and_geometry(
    method: str, base: str, geometry: str, dtype: torch.dtype, name: str
) -> None:
    bases = {**BASES, **FOREIGN_BASES}
    run_both(METHODS[method], bases[base], "sizes", dtype, name, **OPTIONS[geometry])


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
@pytest.mark.parametrize(
    ("base", "method", "option"),
    list(
        itertools.product(
            ["sgdm", "adamw", "rmsprop"], ["sam", "wsam", "coupled", "gsam", "bsam"], OPTIONS
        )
    ),
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
        device = device_of(name)
        params = parameters("unaligned", torch.float32, device)
        params += parameters("sizes", torch.float64, device)
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
        params = parameters("unaligned", torch.float64, device_of(name))
        groups = [
            {"params": params[:2], "lr": 0.1, "rho": 0.01, "gamma": 0.5, "weight_decay": 0.3},
            {"params": params[2:], "lr": 0.01, "rho": 1.0, "gamma": 0.95},
        ]
        optimizer = METHODS["wsam"](groups, BASES["adamw"], rho=0.5, backend=backend)
        for number in range(STEPS):
            step(optimizer, params, number)
        if backend == name:
            assert len(optimizer._engine.lists.lists) == 1
        results.append([param.detach() for param in params])
    for ours, expected in zip(*results, strict=True):
        close(ours, expected, ONE_STEP[torch.float64], "groups")


@pytest.mark.parametrize("name", FUSED)
def test_result_does_not_depend_on_the_number_of_threads(name: str, threads: None) -> None:
    results = []
    for count in (1, 2, 3, 7):
        torch.set_num_threads(count)
        torch.manual_seed(1)
        values = [torch.randn(300_001), torch.randn(70_000)]
        params = [torch.nn.Parameter(value.to(device_of(name))) for value in values]
        optimizer = METHODS["wsam"](
            params, BASES["adamw"], rho=0.5, max_grad_norm=0.1, backend=name
        )
        step(optimizer, params, 0)
        step(optimizer, params, 1)
        results.append(torch.cat([param.detach() for param in params]))
    for other in results[1:]:
        assert torch.equal(results[0], other)
