"""The Triton kernels, interpreted on a CPU, against the reference.

Before Triton 3.9 the interpreter rounds a fused multiply-add twice: within the tolerances.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import interpreted
import per_sample_cases
import pytest
import torch
from cases import BASES, METHODS, OPTIONS, set_gradients, step
from comparison import compare_and_align
from interpreted_steps import (
    ALL_BASES,
    NAME,
    STEPS,
    Values,
    around_chunks,
    check,
    few,
    pair_of_lists,
    strided,
    tiny,
    unaligned,
    whole_chunks,
)
from tolerances import ONE_STEP, PERTURBED, REDUCTION, close
from torch import Tensor

from wsam_fused import _extension
from wsam_fused.backends import BACKENDS
from wsam_fused.plan import TableRow

BACKEND = interpreted.interpreted_backend()

_REASON = BACKEND.unavailable()
# What no interpreter is needed for runs everywhere.
interpreter = pytest.mark.skipif(_REASON is not None, reason=str(_REASON))


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only here: lists of thousands of tensors, as in other tests, would take minutes."""
    monkeypatch.setitem(BACKENDS, NAME, BACKEND)


F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16


def rounds_once() -> bool:
    """Whether the interpreter has a fused multiply-add: from Triton 3.9 on."""
    if _REASON is not None:
        return False
    version = import_module("triton").__version__
    return tuple(map(int, version.split(".")[:2])) >= (3, 9)


def check_per_sample(method: str, base: str, dtype: torch.dtype, option: str) -> None:
    """Like :func:`check`, for methods that are given losses."""
    mine, theirs = pair_of_lists(few, dtype)
    options = per_sample_cases.OPTIONS[option]
    make = per_sample_cases.METHODS[method]
    ours = make(mine, ALL_BASES[base], backend=NAME, **options)
    reference = make(theirs, ALL_BASES[base], backend="eager", **options)
    before = mine[-1].detach().clone()
    for number in range(STEPS):
        ours.step(per_sample_cases.Linear(mine))
        reference.step(per_sample_cases.Linear(theirs))
        compare_and_align(ours, reference, dtype, f"step {number}")
    assert not torch.equal(mine[-1], before), "the comparison would pass by doing nothing"


# ---- whole steps ---------------------------------------------------------------------------------


@interpreter
@pytest.mark.parametrize("base", [*BASES, "rmsprop"])
@pytest.mark.parametrize("method", METHODS)
def test_every_base_and_method(method: str, base: str) -> None:
    check(method, base, **OPTIONS["plain"])


@interpreter
@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("option", per_sample_cases.OPTIONS)
@pytest.mark.parametrize("base", ["sgdm", "adamw", "rmsprop"])
@pytest.mark.parametrize("method", per_sample_cases.METHODS)
def test_methods_with_losses_of_samples(
    method: str, base: str, option: str, dtype: torch.dtype
) -> None:
    check_per_sample(method, base, dtype, option)


@interpreter
@pytest.mark.parametrize("dtype", [F32, F64, BF16])
@pytest.mark.parametrize("values", [few, around_chunks, whole_chunks, strided, tiny])
def test_noise(values: Values, dtype: torch.dtype) -> None:
    lists = pair_of_lists(values, dtype)
    for params, name in zip(lists, (NAME, "eager"), strict=True):
        before = [param.detach().clone() for param in params]
        optimizer = METHODS["sam"](params, BASES["sgd"], backend=name)
        with torch.no_grad():
            engine = optimizer._begin_without_gradients()
            rows = [row._replace(delta=2.0**-6) for row in engine.lists.primary.rows]
            engine.lists.set_rows(rows)
            engine.probe(2**40 + 12345)
            moved = [param.detach().clone() for param in params]
            engine.return_to_weights()
        assert all(torch.equal(param, w) for param, w in zip(params, before, strict=True))
        assert not any(torch.equal(p, w) for p, w in zip(moved, before, strict=True))
        params[:] = moved  # type: ignore[assignment]
    for param, expected in zip(*lists, strict=True):
        assert torch.equal(param, expected)


@interpreter
@pytest.mark.parametrize("base", ["sgd-l2", "nesterov", "adamw", "amsgrad", "rmsprop-maximize"])
@pytest.mark.parametrize("method", ["sam", "wsam", "coupled"])
def test_float64(method: str, base: str) -> None:
    check(method, base, dtype=F64, **OPTIONS["plain"])


@interpreter
@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("base", ["sgd", "nesterov", "adamw", "amsgrad"])
@pytest.mark.parametrize("method", ["sam", "wsam", "gsam", "bsam"])
def test_low_precision_parameters(method: str, base: str, dtype: torch.dtype) -> None:
    check(method, base, dtype=dtype, **OPTIONS["plain"])


@interpreter
@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("option", ["plain", "adaptive", "clip"])
@pytest.mark.parametrize("base", ["sgdm", "adamw"])
def test_low_precision_gradients(base: str, option: str, dtype: torch.dtype) -> None:
    check("wsam", base, gradients=(dtype, dtype), **OPTIONS[option])


@interpreter
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("base", ["sgdm", "adamw"])
@pytest.mark.parametrize(
    "method", ["sam", "wsam", "coupled", "gsam", "bsam", "bsam-as-published", "gnp"]
)
def test_every_option(base: str, method: str, option: str) -> None:
    check(method, base, **OPTIONS[option])


@interpreter
@pytest.mark.parametrize("option", ["plain", "adaptive"])
@pytest.mark.parametrize("values", [unaligned, around_chunks, strided, tiny])
def test_every_layout(values: Values, option: str) -> None:
    check("wsam", "adamw", values, **OPTIONS[option])


@interpreter
@pytest.mark.parametrize("option", ["plain", "adaptive"])
@pytest.mark.parametrize(
    ("dtype", "gradients"),
    [(F32, F32), (F32, BF16), (F32, F16), (BF16, BF16), (F16, F16), (F64, F64)],
    ids=["f32", "f32-bf16", "f32-f16", "bf16", "f16", "f64"],
)
@pytest.mark.parametrize("base", ["sgd", "nesterov", "adamw", "amsgrad"])
def test_whole_blocks(base: str, dtype: torch.dtype, gradients: torch.dtype, option: str) -> None:
    check("wsam", base, whole_chunks, dtype, (gradients, gradients), **OPTIONS[option])


@interpreter
@pytest.mark.skipif(_extension.UNAVAILABLE is not None, reason=str(_extension.UNAVAILABLE))
@pytest.mark.skipif(not rounds_once(), reason="this interpreter rounds a multiply-add twice")
@pytest.mark.parametrize("option", ["plain", "adaptive", "clip"])
@pytest.mark.parametrize("base", ["sgd-l2", "nesterov", "sgdm-dampened", "amsgrad", "adamw"])
def test_float32_has_the_bits_of_the_cpu_kernels(base: str, option: str) -> None:
    """Both round every operation alike; only the float64 sums are added in another order."""
    mine, theirs = pair_of_lists(unaligned, F32)
    for params, name in ((mine, NAME), (theirs, "cpu")):
        optimizer = METHODS["wsam"](params, BASES[base], backend=name, **OPTIONS[option])
        for number in range(STEPS):
            step(optimizer, params, number)
    for param, other in zip(mine, theirs, strict=True):
        assert torch.equal(param, other)


@interpreter
def test_groups_with_values_of_their_own_share_one_launch() -> None:
    results = []
    for backend in (NAME, "eager"):
        torch.manual_seed(1)
        params = [torch.nn.Parameter(tensor) for tensor in few(F64)]
        groups = [
            {"params": params[:2], "lr": 0.1, "rho": 0.01, "gamma": 0.5, "weight_decay": 0.3},
            {"params": params[2:], "lr": 0.01, "rho": 1.0, "gamma": 0.95},
        ]
        optimizer = METHODS["wsam"](groups, BASES["adamw"], rho=0.5, backend=backend)
        for number in range(STEPS):
            step(optimizer, params, number)
        results.append(params)
    for ours, expected in zip(*results, strict=True):
        close(ours.detach(), expected.detach(), ONE_STEP[F64], "groups")


@interpreter
def test_lists_of_several_dtypes_share_one_norm_and_one_skipped_step() -> None:
    results = []
    for backend in (NAME, "eager"):
        torch.manual_seed(1)
        tensors = [*few(F32), *few(F64), *few(BF16)]
        params = [torch.nn.Parameter(tensor) for tensor in tensors]
        optimizer = METHODS["wsam"](params, BASES["sgdm"], rho=0.5, backend=backend)
        step(optimizer, params, 0)
        scalars = optimizer._engine.scalars.clone()
        set_gradients(params, 7)
        params[4].grad.view(-1)[0] = torch.nan  # type: ignore[union-attr]
        optimizer.first_step(zero_grad=True)
        set_gradients(params, 8)
        optimizer.second_step()
        assert int(optimizer.skipped_steps) == 1
        results.append((params, scalars))
    (mine, ours), (theirs, expected) = results
    close(ours, expected, REDUCTION[F64], "norms")
    for param, other in zip(mine, theirs, strict=True):
        close(param.detach(), other.detach(), ONE_STEP[param.dtype], "mixed dtypes")


# ---- what must not happen ------------------------------------------------------------------------


@interpreter
@pytest.mark.parametrize("restore", ["recompute", "backup"])
@pytest.mark.parametrize("absent", [(0, None), (1, 1), (None, 2), (2, 0)])
def test_a_tensor_without_a_gradient_is_restored_and_not_updated(
    absent: tuple[int | None, int | None], restore: str
) -> None:
    results = []
    for backend in (NAME, "eager"):
        torch.manual_seed(1)
        params = [torch.nn.Parameter(tensor) for tensor in few(F32)]
        before = [param.detach().clone() for param in params]
        optimizer = METHODS["wsam"](
            params, BASES["adamw"], rho=0.3, restore=restore, backend=backend
        )
        for evaluation, missing in enumerate(absent):
            set_gradients(params, evaluation)
            if missing is not None:
                params[missing].grad = None
            (optimizer.first_step if evaluation == 0 else optimizer.second_step)(zero_grad=True)
        for index in {index for index in absent if index is not None}:
            assert float(optimizer.state[params[index]]["step"]) == 0
            if restore == "backup" or absent[0] == index:
                assert torch.equal(params[index], before[index])
        results.append((params, optimizer))
    (mine, ours), (theirs, reference) = results
    for param, other in zip(mine, theirs, strict=True):
        close(param.detach(), other.detach(), ONE_STEP[F32], "parameter")
        for key, value in ours.state[param].items():
            close(value, reference.state[other][key], ONE_STEP[F32], key)


@interpreter
@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
@pytest.mark.parametrize("evaluation", [0, 1])
@pytest.mark.parametrize("base", ["nesterov", "amsgrad"])
def test_a_step_with_a_norm_that_is_not_finite_changes_nothing(
    base: str, evaluation: int, bad: float
) -> None:
    params = [torch.nn.Parameter(tensor) for tensor in few(F32)]
    optimizer = METHODS["wsam"](
        params, BASES[base], rho=0.3, restore="backup", check_finite=True, backend=NAME
    )
    step(optimizer, params, 0)
    tensors = [*params, *(v for p in params for v in optimizer.state[p].values())]
    before = [tensor.detach().clone() for tensor in tensors]
    for number in range(2):
        set_gradients(params, number)
        if number == evaluation:
            params[2].grad[3, 3] = bad  # type: ignore[index]
        (optimizer.first_step if number == 0 else optimizer.second_step)(zero_grad=True)
        moved = not torch.equal(params[1], before[1])
        assert moved == (number == 0 and evaluation == 1)
    assert all(torch.equal(t, b) for t, b in zip(tensors, before, strict=True))
    assert int(optimizer.skipped_steps) == 1
    step(optimizer, params, 3)
    assert int(optimizer.skipped_steps) == 1
    assert not torch.equal(params[1], before[1])


@interpreter
def test_a_coefficient_of_zero_takes_an_infinite_gradient_out() -> None:
    results = []
    for backend in (NAME, "eager"):
        torch.manual_seed(1)
        params = [torch.nn.Parameter(tensor) for tensor in few(F32)]
        optimizer = METHODS["wsam-gamma-0"](params, BASES["adamw"], rho=0.3, backend=backend)
        set_gradients(params, 0)
        optimizer.first_step(zero_grad=True)
        for param in params:
            param.grad = torch.full_like(param, torch.inf)
        optimizer.second_step()
        results.append(params)
    for ours, expected in zip(*results, strict=True):
        assert torch.isfinite(ours).all()
        close(ours.detach(), expected.detach(), ONE_STEP[F32], "parameter")


@interpreter
@pytest.mark.parametrize("size", [0.0, 1e-42])
def test_a_vanishing_norm(size: float) -> None:
    results = []
    for backend in (NAME, "eager"):
        torch.manual_seed(1)
        params = [torch.nn.Parameter(tensor) for tensor in few(F32)]
        optimizer = METHODS["sam"](params, BASES["sgd"], rho=1.0, eps=0.0, backend=backend)
        for param in params:
            param.grad = torch.full_like(param, size)
        optimizer.first_step(zero_grad=True)
        results.append([param.detach().clone() for param in params])
        optimizer.restore()
    for ours, expected in zip(*results, strict=True):
        close(ours, expected, PERTURBED[F32], "perturbed parameter")


@interpreter
@pytest.mark.parametrize("dtype", [F32, F64, BF16])
@pytest.mark.parametrize("options", [{}, {"restore": "backup"}, {"adaptive": True}])
def test_restore_brings_the_weights_back(options: dict[str, Any], dtype: torch.dtype) -> None:
    params = [torch.nn.Parameter(tensor) for tensor in unaligned(dtype)]
    before = [param.detach().clone() for param in params]
    optimizer = METHODS["wsam"](params, BASES["sgd"], rho=3.0, backend=NAME, **options)
    set_gradients(params, 3)
    optimizer.first_step(zero_grad=True)
    perturbed = [param.detach().clone() for param in params]
    assert not torch.equal(params[1], before[1])
    optimizer.restore()
    for param, w, p in zip(params, before, perturbed, strict=True):
        if options or dtype == BF16:
            assert torch.equal(param, w)
        else:  # as derived in test_operations.py
            unit = torch.finfo(dtype).eps * torch.maximum(p.abs(), w.abs())
            assert ((param - w).abs() <= unit).all()
    optimizer.restore()
    assert torch.equal(params[1], before[1]) or not (options or dtype == BF16)


@interpreter
def test_result_does_not_depend_on_the_number_of_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for programs in (1, 2, 3, 100):
        monkeypatch.setattr(interpreted, "PROGRAMS", programs)
        torch.manual_seed(1)
        params = [torch.nn.Parameter(tensor) for tensor in around_chunks(F32)]
        optimizer = METHODS["wsam"](
            params, BASES["adamw"], rho=0.5, max_grad_norm=0.1, adaptive=True, backend=NAME
        )
        for number in range(STEPS):
            step(optimizer, params, number)
        results.append(torch.cat([param.detach() for param in params]))
        flags = optimizer._engine.lists.lists[0].flags
        assert flags.tolist() == [0.0, 0.0], "the counter is not back at 0"
    for other in results[1:]:
        assert torch.equal(results[0], other)


# ---- what no method asks for yet -----------------------------------------------------------------


@interpreter
@pytest.mark.parametrize("evaluations", [1, 3])
@pytest.mark.parametrize("base", ["sgd", "adamw", "rmsprop"])
def test_one_and_three_evaluations(base: str, evaluations: int) -> None:
    row = {"h1": 0.5, "h2": -1.5, "h3": 2.0, "d1": 0.25, "d2": 1.0, "d3": -3.0}
    written: list[list[Tensor]] = []
    for backend in (NAME, "eager"):
        torch.manual_seed(1)
        params = [torch.nn.Parameter(tensor) for tensor in few(F32)]
        optimizer = METHODS["wsam"](params, ALL_BASES[base], rho=0.3, backend=backend)
        set_gradients(params, 0)
        optimizer.first_step(zero_grad=True)
        engine = optimizer._engine
        (tensors,) = engine.lists.lists
        for evaluation in range(1, evaluations):
            set_gradients(params, evaluation)
            grads = [param.grad for param in params]
            tensors.grads[evaluation] = grads
            addresses = torch.tensor([grad.data_ptr() for grad in grads])
            BACKENDS[backend].bind(tensors, evaluation, addresses)
        engine.lists.set_rows([old._replace(**row) for old in engine.lists.primary.rows])
        with torch.no_grad():
            BACKENDS[backend].updating(
                tensors,
                tensors.key.rule,
                evaluations,
                required=(1 << evaluations) - 1,
                checked=0b1,
                keep_point=False,
                count_skipped=True,
            )()
        states = [tensor for states in tensors.states for tensor in states]
        # The rule `none` has written h and d over the gradients.
        written.append([*params, *states, *tensors.grads[0], *tensors.grads[1]])
    for ours, expected in zip(*written, strict=True):
        close(ours.detach(), expected.detach(), ONE_STEP[F32], "what was written")


@interpreter
def test_an_offset_beyond_32_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table may claim elements in front of those that the chunks reach: they are not touched."""
    (param,) = params = [torch.nn.Parameter(torch.randn(3000))]
    w = param.detach().clone()
    bind = BACKEND.bind
    results = []
    for shift in (0, 2**33):

        def shifted(tensors: Any, evaluation: int, addresses: Tensor, by: int = shift) -> None:
            bind(tensors, evaluation, addresses - 4 * by)
            table = tensors.table.table
            table[TableRow.PARAM] = param.data_ptr() - 4 * by
            table[TableRow.OFFSET] = -by
            table[TableRow.SIZE] = param.numel() + by

        monkeypatch.setattr(BACKEND, "bind", shifted)
        optimizer = METHODS["wsam"](params, BASES["sgd"], rho=0.3, backend=NAME)
        set_gradients(params, 1)
        optimizer.first_step(zero_grad=True)
        results.append(param.detach().clone())
        param.data.copy_(w)
    assert not torch.equal(results[0], w)
    assert torch.equal(results[0], results[1])
