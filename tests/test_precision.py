"""16-bit parameters: float32 weights in the state, states of 16 bits, rounding by chance.

Every backend against the reference, and what a user relies on: exact restores, weights that lose
nothing, states in the dtype that was asked for, checkpoints.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from cases import (
    BASES,
    KEEPING,
    METHODS,
    OPTIONS,
    device_of,
    keepings_of,
    parameters,
    seed_of,
    set_gradients,
    step,
)
from cases import call as hand_over
from comparison import run_both
from precision_cases import BACKEND, DTYPE, FUSED, LOW, NAMES

from wsam_fused import SAM, WSAM
from wsam_fused.precision import MASTER_KEY

KEPT = pytest.mark.parametrize("keeping", KEEPING)


def kept(keeping: str, dtype: torch.dtype) -> dict[str, Any]:
    if keeping not in keepings_of(dtype):
        pytest.skip("float16 is not rounded by chance")
    return KEEPING[keeping]


@FUSED
@DTYPE
@KEPT
@pytest.mark.parametrize("base", ["sgd", "nesterov", "amsgrad", "adamw"])
@pytest.mark.parametrize("method", ["sam", "wsam", "gsam", "bsam", "bsam-as-published"])
def test_equals_reference(
    method: str, base: str, keeping: str, dtype: torch.dtype, name: str
) -> None:
    options = {**OPTIONS["plain"], **kept(keeping, dtype)}
    run_both(METHODS[method], BASES[base], "sizes", dtype, name, **options)


@FUSED
@DTYPE
@KEPT
@pytest.mark.parametrize("option", ["asam", "fisher", "clip"])
@pytest.mark.parametrize("layout", ["unaligned", "strided", "many-chunks"])
def test_equals_reference_with_options(
    layout: str, option: str, keeping: str, dtype: torch.dtype, name: str
) -> None:
    options = {**OPTIONS[option], **kept(keeping, dtype)}
    run_both(METHODS["wsam"], BASES["adamw"], layout, dtype, name, **options)


@BACKEND
@DTYPE
def test_master_weights_take_the_steps_of_float32(dtype: torch.dtype, name: str) -> None:
    """With gradients that both have, the float32 weights are those of a float32 optimizer."""
    low = parameters("unaligned", dtype, device_of(name))
    wide = [torch.nn.Parameter(param.detach().float()) for param in low]
    one = WSAM(low, BASES["adamw"], rho=0.0, backend=name, master_weights=True)
    other = WSAM(wide, BASES["adamw"], rho=0.0, backend="eager")
    for number in range(5):
        for evaluation in range(2):
            set_gradients(low, 2 * number + evaluation)
            for param, follower in zip(low, wide, strict=True):
                follower.grad = param.grad.float()  # type: ignore[union-attr]
            for optimizer in (one, other):
                (optimizer.first_step, optimizer.second_step)[evaluation](zero_grad=True)
    for param, expected in zip(low, wide, strict=True):
        master = one.state[param][MASTER_KEY]
        assert master.dtype == torch.float32
        torch.testing.assert_close(master, expected.detach(), rtol=5e-6, atol=2e-5)
        assert torch.equal(param, master.to(dtype)), "the parameter is a copy of them"


@BACKEND
def test_small_updates_are_not_lost(name: str) -> None:
    """Updates of a 16th of the spacing of bfloat16: to nearest they vanish."""
    moved = {}
    for keeping in ("none", "master", "chance"):
        param = torch.nn.Parameter(torch.ones(4096, dtype=torch.bfloat16, device=device_of(name)))
        options = KEEPING.get(keeping, {})
        optimizer = SAM([param], BASES["sgd"], rho=0.0, backend=name, **options)
        optimizer.param_groups[0]["lr"] = 2.0**-12
        for _ in range(32):
            for call in (optimizer.first_step, optimizer.second_step):
                param.grad = torch.ones_like(param)
                call(zero_grad=True)
        moved[keeping] = 1.0 - param.detach().double().mean().item()
    assert moved["none"] == 0.0
    assert moved["master"] == 2.0**-7
    # 4096 elements, each off by less than a spacing of 2^-8 in each of two steps or so: the mean is
    # within 5 sigma of 2^-8 / sqrt(4096) * sqrt(2).
    assert abs(moved["chance"] - 2.0**-7) < 5 * 2.0**-8 / 64 * 1.5


@pytest.mark.skipif("cpu" not in NAMES, reason="the extension is not built")
@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("cpu", "eager")])
@DTYPE
@KEPT
@pytest.mark.parametrize("base", ["nesterov", "amsgrad"])
def test_has_the_bits_of_the_cpu_kernels(
    base: str, keeping: str, dtype: torch.dtype, name: str
) -> None:
    """All round every operation alike; only the float64 sums are added in another order."""
    compare_bits("cpu", name, "bsam-as-published", BASES[base], dtype, **kept(keeping, dtype))


@FUSED
@DTYPE
def test_noise_goes_from_the_float32_weights(dtype: torch.dtype, name: str) -> None:
    """Which no method asks for yet."""
    moved = []
    for backend in (name, "eager"):
        torch.manual_seed(0)
        params = parameters("awkward", dtype, device_of(name))
        optimizer = SAM(params, BASES["sgd"], backend=backend, master_weights=True)
        engine = optimizer._begin_without_gradients()
        engine.lists.set_rows([row._replace(delta=0.25) for row in engine.lists.primary.rows])
        masters = [optimizer.state[param][MASTER_KEY] for param in params]
        with torch.no_grad():
            for param, master in zip(params, masters, strict=True):
                param.round_()  # so that no sum is rounded but when it is stored
                master.copy_(param + 2.0**-12)
            before = [master.clone() for master in masters]
            engine.probe(12345)
            moved.append([param.detach().clone() for param in params])
            for param, w in zip(params, before, strict=True):
                low, high = ((w + z * 0.25).to(dtype) for z in (-1.0, 1.0))
                assert ((param == low) | (param == high)).all()
            engine.return_to_weights()
        for param, master, w in zip(params, masters, before, strict=True):
            assert torch.equal(master, w)
            assert torch.equal(param, w.to(dtype))
    assert all(torch.equal(p, expected) for p, expected in zip(*moved, strict=True))


@FUSED
@pytest.mark.parametrize("keeping", ["chance", "chance-narrow"])
def test_chance_has_the_bits_of_the_reference(keeping: str, name: str) -> None:
    """Numbers of few bits: no operation rounds but the last."""
    base = functools.partial(torch.optim.SGD, lr=2.0**-10, momentum=0.5)
    options = {"rho": 0.0, **KEEPING[keeping]}
    compare_bits("eager", name, "sam", base, torch.bfloat16, bits=5, **options)


def compare_bits(
    one: str, other: str, method: str, base: Any, dtype: torch.dtype, bits: int = 8, **options: Any
) -> None:
    """Make steps with two backends; parameters and states are the same bits afterwards.

    ``bits`` of the significands of parameters and gradients are not 0.
    """
    kept_bits = []
    for name in (one, other):
        torch.manual_seed(0)
        params = parameters("awkward", dtype, device_of(name))
        optimizer = METHODS[method](params, base, backend=name, **options)
        with torch.no_grad():
            for param in params:
                param.copy_((param * 2.0 ** (bits - 3)).round() * 2.0 ** (3 - bits))
        for number in range(3):
            for evaluation in range(optimizer.evaluations):
                set_gradients(params, seed_of(number, evaluation))
                for param in params:
                    grad = param.grad
                    assert grad is not None
                    grad.copy_((grad * 2.0 ** (bits - 3)).round() * 2.0 ** (3 - bits))
                hand_over(optimizer, evaluation)
        states = [value for param in params for value in optimizer.state[param].values()]
        kept_bits.append([tensor.detach().cpu() for tensor in [*params, *states]])
    for tensor, expected in zip(*kept_bits, strict=True):
        assert torch.equal(tensor, expected)


@BACKEND
@DTYPE
@KEPT
def test_restore_is_exact(keeping: str, dtype: torch.dtype, name: str) -> None:
    params = parameters("unaligned", dtype, device_of(name))
    optimizer = METHODS["wsam"](
        params, BASES["adamw"], rho=3.0, backend=name, **kept(keeping, dtype)
    )
    step(optimizer, params, 0)
    before = [param.detach().clone() for param in params]
    masters = copy.deepcopy([optimizer.state[param].get(MASTER_KEY) for param in params])
    set_gradients(params, 7)
    optimizer.first_step(zero_grad=True)
    assert not torch.equal(params[1], before[1])
    optimizer.restore()
    for param, w, master in zip(params, before, masters, strict=True):
        assert torch.equal(param, w)
        assert master is None or torch.equal(optimizer.state[param][MASTER_KEY], master)


@BACKEND
@DTYPE
@KEPT
def test_a_skipped_step_changes_nothing(keeping: str, dtype: torch.dtype, name: str) -> None:
    params = parameters("unaligned", dtype, device_of(name))
    optimizer = METHODS["wsam"](
        params, BASES["adamw"], rho=3.0, backend=name, check_finite=True, **kept(keeping, dtype)
    )
    step(optimizer, params, 0)
    for evaluation in range(2):
        before = copy.deepcopy([(p.detach(), *optimizer.state[p].values()) for p in params])
        for now in range(2):
            set_gradients(params, 3 + now)
            if now == evaluation:
                params[2].grad[0] = float("inf")  # type: ignore[index]
            (optimizer.first_step, optimizer.second_step)[now](zero_grad=True)
        for param, saved in zip(params, before, strict=True):
            for now_, then in zip((param, *optimizer.state[param].values()), saved, strict=True):
                assert torch.equal(now_, then)
    assert optimizer.skipped_steps == 2


@BACKEND
@DTYPE
def test_state_dtypes(dtype: torch.dtype, name: str) -> None:
    for narrow, wanted in ((False, torch.float32), (True, dtype)):
        params = parameters("awkward", dtype, device_of(name))
        optimizer = WSAM(
            params,
            BASES["adamw"],
            backend=name,
            state_dtype="parameter" if narrow else "float32",
            master_weights=True,
        )
        step(optimizer, params, 0)
        for param in params:
            state = optimizer.state[param]
            assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == wanted
            assert state[MASTER_KEY].dtype == torch.float32
            assert state[MASTER_KEY].stride() == param.stride()


def test_every_number_of_16_bits_is_read_as_torch_says() -> None:
    for dtype in LOW:
        values = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
        values = torch.where(values.isfinite(), values, torch.zeros_like(values))
        param = torch.nn.Parameter(torch.zeros_like(values))
        optimizer = SAM([param], BASES["sgd"], rho=0.0, backend="cpu", master_weights=True)
        optimizer.param_groups[0]["lr"] = 1.0
        for call in (optimizer.first_step, optimizer.second_step):
            param.grad = values.clone()
            call(zero_grad=True)
        assert torch.equal(optimizer.state[param][MASTER_KEY], -values.float())
        assert torch.equal(param, -values)


def test_roundings_to_nearest_are_those_of_torch() -> None:
    for dtype in LOW:
        generator = torch.Generator().manual_seed(0)
        wide = torch.randint(-(2**31), 2**31, (200_000,), generator=generator).to(torch.int32)
        values = wide.view(torch.float32)
        values = torch.where(values.isnan(), torch.zeros_like(values), values)
        for scale in (1.0, 1e-30):
            master = values * scale if scale != 1.0 else values
            ties = (torch.arange(4096, dtype=torch.float32) + 0.5) * 2.0**-24
            master = torch.cat([master, ties, -ties, 1.0 + ties * 2**13, ties * 2**24 * 16])
            param = torch.nn.Parameter(torch.zeros_like(master, dtype=dtype))
            optimizer = SAM([param], BASES["sgd"], rho=0.0, backend="cpu", master_weights=True)
            optimizer.param_groups[0]["lr"] = 0.0
            param.grad = torch.zeros_like(param)
            optimizer.first_step(zero_grad=True)
            optimizer.state[param][MASTER_KEY].copy_(master)
            param.grad = torch.zeros_like(param)
            optimizer.second_step()
            assert torch.equal(param, master.to(dtype))


@pytest.mark.parametrize(
    ("options", "dtype", "message"),
    [
        ({"state_dtype": "bfloat16"}, torch.bfloat16, "state_dtype is 'bfloat16', expected one of"),
        (
            {"master_weights": True, "stochastic_rounding": True},
            torch.bfloat16,
            "stochastic_rounding is True with master_weights",
        ),
        ({"stochastic_rounding": True}, torch.float16, "float16 parameter, expected bfloat16"),
    ],
)
def test_bad_arguments(options: dict[str, Any], dtype: torch.dtype, message: str) -> None:
    params = [torch.nn.Parameter(torch.zeros(3, dtype=dtype))]
    with pytest.raises(ValueError, match=message):
        WSAM(params, BASES["sgd"], **options)


@pytest.mark.parametrize("keeping", KEEPING)
def test_not_with_a_foreign_base(keeping: str) -> None:
    params = [torch.nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))]
    with pytest.raises(ValueError, match="stepped as it is, expected torch"):
        WSAM(params, torch.optim.RMSprop, **KEEPING[keeping])
