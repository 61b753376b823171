"""bfloat16 and float16: parameters with float32 states, and gradients lower than the parameters."""

from __future__ import annotations

import pytest
import torch
from cases import BASES, FOREIGN_BASES, METHODS, OPTIONS, device_of, parameters, step
from comparison import run_both

from wsam_fused import gradients, widening
from wsam_fused.backends import BACKENDS

LOW = [torch.bfloat16, torch.float16]
# "eager" takes any dtype: it is what the others are compared with.
NAMES = [
    name
    for name, backend in BACKENDS.items()
    if torch.bfloat16 in backend.DTYPES and backend.unavailable() is None
]

pytestmark = pytest.mark.parametrize("dtype", LOW, ids=["bfloat16", "float16"])
BACKEND = pytest.mark.parametrize("name", NAMES)
READS_LOWER = pytest.mark.parametrize(
    "name", [name for name in NAMES if BACKENDS[name].GRADIENT_DTYPES]
)


@BACKEND
@pytest.mark.parametrize("base", ["sgd", "nesterov", "amsgrad", "adamw", "rmsprop"])
@pytest.mark.parametrize("method", ["sam", "wsam", "coupled", "gsam", "bsam", "bsam-as-published"])
def test_low_precision_parameters(method: str, base: str, dtype: torch.dtype, name: str) -> None:
    if base == "rmsprop" and dtype == torch.float16:
        pytest.skip("torch's RMSprop divides by zero: its squares and its eps vanish in float16")
    bases = {**BASES, **FOREIGN_BASES}
    run_both(METHODS[method], bases[base], "sizes", dtype, name, **OPTIONS["plain"])


@BACKEND
@pytest.mark.parametrize("option", ["asam", "fisher", "clip", "backup"])
@pytest.mark.parametrize("layout", ["unaligned", "strided", "many-chunks"])
def test_low_precision_options_and_layouts(
    layout: str, option: str, dtype: torch.dtype, name: str
) -> None:
    run_both(METHODS["wsam"], BASES["adamw"], layout, dtype, name, **OPTIONS[option])


@BACKEND
@pytest.mark.parametrize("option", ["plain", "adaptive", "clip"])
@pytest.mark.parametrize("base", ["sgdm", "adamw", "rmsprop"])
@pytest.mark.parametrize("method", ["sam", "wsam"])
def test_low_precision_gradients(
    method: str, base: str, option: str, dtype: torch.dtype, name: str
) -> None:
    bases = {**BASES, **FOREIGN_BASES}
    run_both(
        METHODS[method],
        bases[base],
        "unaligned",
        torch.float32,
        name,
        (dtype, dtype),
        **OPTIONS[option],
    )


@BACKEND
@pytest.mark.parametrize("order", ["low-high", "high-low"])
@pytest.mark.parametrize("option", ["plain", "adaptive"])
def test_gradients_of_two_dtypes_in_one_step(
    option: str, order: str, dtype: torch.dtype, name: str
) -> None:
    dtypes = (dtype, torch.float32) if order == "low-high" else (torch.float32, dtype)
    for method in ("sam", "wsam"):
        run_both(
            METHODS[method],
            BASES["adamw"],
            "unaligned",
            torch.float32,
            name,
            dtypes,
            **OPTIONS[option],
        )


@READS_LOWER
def test_failing_to_widen_gradients_restores_the_weights(
    dtype: torch.dtype, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = torch.float16 if dtype == torch.bfloat16 else torch.bfloat16
    params = parameters("unaligned", torch.float32, device_of(name))
    optimizer = METHODS["wsam"](params, BASES["adamw"], rho=0.5, backend=name)
    step(optimizer, params, 0, (dtype, dtype))
    before = [param.detach().clone() for param in params]
    made = []

    def widen(param: torch.Tensor, grad: torch.Tensor, wide: torch.dtype) -> torch.Tensor:
        if len(made) == len(params):
            raise MemoryError("no memory for the second gradients")
        made.append(gradients.walkable(param, grad, wide))
        return made[-1]

    monkeypatch.setattr(widening, "walkable", widen)
    with pytest.raises(MemoryError, match="no memory"):
        step(optimizer, params, 1, (dtype, other))
    for param, w in zip(params, before, strict=True):
        unit = torch.finfo(torch.float32).eps * torch.maximum(param.abs(), w.abs() + 0.5)
        assert ((param - w).abs() <= unit).all()


@READS_LOWER
def test_low_precision_gradients_are_not_copied(dtype: torch.dtype, name: str) -> None:
    params = parameters("unaligned", torch.float32, device_of(name))
    optimizer = METHODS["wsam"](params, BASES["adamw"], rho=0.1, backend=name)
    step(optimizer, params, 0, (dtype, dtype))
    for param in params:
        param.grad_dtype = dtype
        param.grad = torch.ones_like(param, dtype=dtype)
    addresses = [param.grad.data_ptr() for param in params]
    optimizer.first_step(zero_grad=True)
    taken = optimizer._engine.lists.lists[0].grads[0]
    assert [grad.data_ptr() for grad in taken] == addresses
    assert {grad.dtype for grad in taken} == {dtype}
    optimizer.restore()


@pytest.mark.parametrize("name", [*NAMES, "eager"])
def test_states_are_float32_and_survive_a_checkpoint(dtype: torch.dtype, name: str) -> None:
    optimizers = []
    for _ in range(2):
        torch.manual_seed(0)
        params = parameters("unaligned", dtype, device_of(name))
        optimizers.append(METHODS["wsam"](params, BASES["adamw"], rho=0.1, backend=name))
        step(optimizers[-1], params, 0)
    one, other = optimizers
    other.load_state_dict(one.state_dict())
    pairs = zip(one.param_groups[0]["params"], other.param_groups[0]["params"], strict=True)
    for param, loaded in pairs:
        for key in ("exp_avg", "exp_avg_sq"):
            assert other.state[loaded][key].dtype == torch.float32
            assert torch.equal(one.state[param][key], other.state[loaded][key])
        rounded = one.state[param]["exp_avg"].to(dtype).float()
        assert not torch.equal(rounded, one.state[param]["exp_avg"]), "nothing could be lost"


@BACKEND
def test_restore_is_exact(dtype: torch.dtype, name: str) -> None:
    params = parameters("unaligned", dtype, device_of(name))
    before = [param.detach().clone() for param in params]
    optimizer = METHODS["wsam"](params, BASES["adamw"], rho=3.0, backend=name)
    for param in params:
        param.grad = torch.randn_like(param)
    optimizer.first_step(zero_grad=True)
    assert not torch.equal(params[1], before[1])
    optimizer.restore()
    for param, w in zip(params, before, strict=True):
        assert torch.equal(param, w)
