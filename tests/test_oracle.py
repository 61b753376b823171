"""The reference itself, against a model of it that knows neither tensors nor tables.

Whole steps are computed here once more, one float at a time, from the equations of
``docs/methods.md``; noise and rounding by chance with whole numbers of Python.
"""

from __future__ import annotations

import functools
import math
import struct
from typing import Any

import pytest
import torch
from cases import BASES, call
from torch import Tensor
from torch.optim import SGD, AdamW

from wsam_fused import BSAM, GNP, GSAM, RWSAM, SAM, WSAM
from wsam_fused.backends import eager
from wsam_fused.plan import Slot

Floats = list[list[float]]
START: Floats = [[1.5, -2.0, 0.25], [-0.5, 3.0], [2.0]]
GRADIENTS: list[Floats] = [
    [[0.5, -1.0, 2.0], [0.25, -0.75], [1.25]],
    [[1.0, 0.5, -1.5], [-0.5, 1.75], [0.5]],
    [[-0.25, 0.75, 1.0], [1.5, 0.25], [-1.0]],
]
RHO, RHO_MIN, EPS = 0.3, 0.2, 1e-12


def vectors(values: Floats, dtype: torch.dtype = torch.float64) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.tensor(each, dtype=dtype)) for each in values]


def give(params: list[torch.nn.Parameter], gradients: Any) -> None:
    for param, values in zip(params, gradients, strict=True):
        param.grad = None if values is None else torch.tensor(values, dtype=param.dtype)


def norm_of(values: Floats) -> float:
    return math.sqrt(sum(value * value for each in values for value in each))


def dot(left: Floats, right: Floats) -> float:
    return sum(a * b for x, y in zip(left, right, strict=True) for a, b in zip(x, y, strict=True))


# ---- the model -----------------------------------------------------------------------------------

GEOMETRIES: dict[str, tuple[dict[str, Any], Any]] = {
    "euclidean": ({}, lambda w, g: 1.0),
    "adaptive": ({"geometry": "adaptive", "eta": 0.3}, lambda w, g: (abs(w) + 0.3) ** 2),
    "fisher": ({"geometry": "fisher", "eta": 0.7}, lambda w, g: 1 / (1 + 0.7 * g * g)),
}
# h and d of clipped gradients
METHODS: dict[str, tuple[Any, Any, Any]] = {
    "sam": (SAM, lambda g: (0, 1, 0), (0, 0)),
    "wsam": (functools.partial(WSAM, gamma=0.75), lambda g: (1, 0, 0), (-3, 3)),
    "coupled": (functools.partial(WSAM, gamma=0.75, decouple=False), lambda g: (-2, 3, 0), (0, 0)),
    "gnp": (functools.partial(GNP, alpha=0.25), lambda g: (0.75, 0.25, 0), (0, 0)),
    "gsam": (
        functools.partial(GSAM, alpha=0.4),
        lambda g: (-0.4, 1 + 0.4 * dot(g[0], g[1]) / dot(g[1], g[1]), 0),
        (0, 0),
    ),
    "bsam": (
        functools.partial(BSAM, rho_min=RHO_MIN),
        lambda g: (1, 1, -norm_of(g[1]) / norm_of(g[2])),
        (0, 0),
    ),
}


class Model:
    """One optimizer over lists of floats."""

    def __init__(self, geometry: str, method: str, base: str, max_norm: float | None) -> None:
        self.metric = GEOMETRIES[geometry][1]
        self.h, self.d = METHODS[method][1:]
        self.group = BASES[base]([torch.nn.Parameter(torch.ones(1))]).param_groups[0]
        self.sign = -1.0 if self.group["maximize"] else 1.0
        self.max_norm = max_norm
        self.w = [list(each) for each in START]
        self.states: dict[tuple[int, int], list[float]] = {}
        self.t = 0

    def at(self, radius: float) -> Floats:
        """The weights at a distance along the gradient that raises the loss."""
        metrics = [
            [self.metric(w, g) for w, g in zip(*pair, strict=True)]
            for pair in zip(self.w, GRADIENTS[0], strict=True)
        ]
        squares = [
            m * g * g
            for pair in zip(metrics, GRADIENTS[0], strict=True)
            for m, g in zip(*pair, strict=True)
        ]
        scale = self.sign * radius / (math.sqrt(sum(squares)) + EPS)
        return [
            [w + scale * m * g for w, m, g in zip(*triple, strict=True)]
            for triple in zip(self.w, metrics, GRADIENTS[0], strict=True)
        ]

    def step(self) -> None:
        self.t += 1
        clipped = [
            [[value * self.clip(each) for value in row] for row in each] for each in GRADIENTS
        ]
        h = self.h(clipped)
        for i, row in enumerate(self.w):
            for j, w in enumerate(row):
                g = [each[i][j] for each in clipped]
                fed = self.sign * sum(a * b for a, b in zip(h, g, strict=True))
                apart = self.sign * (self.d[0] * g[0] + self.d[1] * g[1])
                row[j] = self.base(w, fed, (i, j)) - self.group["lr"] * apart

    def clip(self, gradient: Floats) -> float:
        if self.max_norm is None:
            return 1.0
        return min(1.0, self.max_norm / (norm_of(gradient) + 1e-6))

    def base(self, w: float, h: float, place: tuple[int, int]) -> float:
        group, lr = self.group, self.group["lr"]
        if "betas" not in group:
            u = h + group["weight_decay"] * w
            if not group["momentum"]:
                return w - lr * u
            (v,) = self.states.setdefault(place, [0.0])
            v = group["momentum"] * v + (1 if self.t == 1 else 1 - group["dampening"]) * u
            self.states[place] = [v]
            return w - lr * (u + group["momentum"] * v if group["nesterov"] else v)
        if group["decoupled_weight_decay"]:
            w -= lr * group["weight_decay"] * w
        else:
            h += group["weight_decay"] * w
        m, v, largest = self.states.setdefault(place, [0.0, 0.0, 0.0])
        beta1, beta2 = group["betas"]
        m, v = beta1 * m + (1 - beta1) * h, beta2 * v + (1 - beta2) * h * h
        largest = max(largest, v)
        self.states[place] = [m, v, largest]
        second = (largest if group["amsgrad"] else v) / (1 - beta2**self.t)
        return w - lr * m / (1 - beta1**self.t) / (math.sqrt(second) + group["eps"])


def same(params: list[torch.nn.Parameter], expected: Floats) -> None:
    for param, values in zip(params, expected, strict=True):
        assert param.tolist() == pytest.approx(values, rel=1e-12, abs=1e-14)


COMBINATIONS = [
    *(("euclidean", "wsam", base, None) for base in BASES),
    *((geometry, method, "adamw", None) for geometry in GEOMETRIES for method in METHODS),
    *(("euclidean", method, "sgdm", 1.5) for method in METHODS),
    *((geometry, "bsam", "sgdm-maximize", None) for geometry in GEOMETRIES),
    ("euclidean", "gsam", "adamw-maximize", 100.0),
]


@pytest.mark.parametrize("restore", ["recompute", "backup"])
@pytest.mark.parametrize(("geometry", "method", "base", "max_norm"), COMBINATIONS)
def test_steps_are_those_of_the_model(
    geometry: str, method: str, base: str, max_norm: float | None, restore: str
) -> None:
    options = {**GEOMETRIES[geometry][0], "max_grad_norm": max_norm, "restore": restore}
    params = vectors(START)
    optimizer = METHODS[method][0](params, BASES[base], rho=RHO, backend="eager", **options)
    model = Model(geometry, method, base, max_norm)
    points = [model.at(RHO), model.at(-RHO_MIN)]
    for number in range(3):
        for evaluation in range(optimizer.evaluations):
            give(params, GRADIENTS[evaluation])
            call(optimizer, evaluation)
            if number == 0 and evaluation < optimizer.evaluations - 1:
                same(params, points[evaluation])
        model.step()
        same(params, model.w)


def test_the_published_bsam_starts_from_the_descent_point() -> None:
    params = vectors(START)
    optimizer = BSAM(
        params, SGD, rho=RHO, rho_min=RHO_MIN, as_published=True, lr=0.1, backend="eager"
    )
    model = Model("euclidean", "bsam", "sgd", None)
    model.group["lr"] = 0.1
    for evaluation in range(3):
        give(params, GRADIENTS[evaluation])
        call(optimizer, evaluation)
    model.w = model.at(-RHO_MIN)
    model.step()
    same(params, model.w)


@pytest.mark.parametrize("restore", ["recompute", "backup"])
@pytest.mark.parametrize("evaluations", [1, 2])
def test_the_weights_come_back_from_every_point(evaluations: int, restore: str) -> None:
    params = vectors(START)
    optimizer = BSAM(params, SGD, rho=RHO, rho_min=RHO_MIN, restore=restore, backend="eager")
    for evaluation in range(evaluations):
        give(params, GRADIENTS[evaluation])
        call(optimizer, evaluation)
    optimizer.restore()
    same(params, START)
    assert not optimizer.is_perturbed


# ---- what is missing, not finite, zero or scaled -------------------------------------------------


def test_parameters_without_a_gradient_stay_where_they_are() -> None:
    params = vectors(START)
    optimizer = WSAM(params, SGD, rho=RHO, gamma=0.5, lr=0.1, momentum=0.9, backend="eager")
    give(params, [None, *GRADIENTS[0][1:]])
    optimizer.first_step(zero_grad=True)
    assert params[0].tolist() == START[0]
    assert params[2].tolist() != START[2]
    give(params, [GRADIENTS[1][0], GRADIENTS[1][1], None])
    optimizer.second_step(zero_grad=True)
    assert params[0].tolist() == START[0]
    assert params[1].tolist() != START[1]
    assert params[2].tolist() == pytest.approx(START[2], rel=1e-15)
    assert [bool(optimizer.state[p]["momentum_buffer"].any()) for p in params] == [
        False,
        True,
        False,
    ]


BROKEN = [
    (WSAM, 0, {}, True),
    (WSAM, 1, {}, False),
    (WSAM, 1, {"check_finite": True}, True),
    (WSAM, 1, {"max_grad_norm": 1.0}, True),
    (BSAM, 1, {"check_finite": True}, True),
    (BSAM, 2, {"check_finite": True}, True),
    (BSAM, 2, {}, True),
]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(("method", "where", "options", "skipped"), BROKEN)
def test_a_gradient_that_is_not_finite(
    method: Any, where: int, options: Any, skipped: bool, value: float
) -> None:
    params = vectors(START)
    optimizer = method(params, AdamW, rho=RHO, restore="backup", backend="eager", **options)
    for number in range(2):
        for evaluation in range(optimizer.evaluations):
            give(params, GRADIENTS[evaluation])
            if number == 1 and evaluation == where:
                params[1].grad[0] = value  # type: ignore[index]
            call(optimizer, evaluation)
        if number == 0:
            before = [param.tolist() for param in params]
            states = [[s.tolist() for s in optimizer.state[p].values()] for p in params]
    assert optimizer.skipped_steps.item() == float(skipped)
    assert ([param.tolist() for param in params] == before) == skipped
    now = [[s.tolist() for s in optimizer.state[p].values()] for p in params]
    assert (now == states) == skipped


def test_a_gradient_of_weight_0_may_be_anything() -> None:
    params = vectors(START)
    optimizer = WSAM(params, SGD, rho=RHO, gamma=0.0, lr=0.1, backend="eager")
    give(params, GRADIENTS[0])
    optimizer.first_step(zero_grad=True)
    give(params, [[math.nan] * len(each) for each in START])
    optimizer.second_step()
    pairs = zip(START, GRADIENTS[0], strict=True)
    same(params, [[w - 0.1 * g for w, g in zip(*pair, strict=True)] for pair in pairs])


def test_a_gradient_of_0_moves_nothing_and_a_tiny_one_no_further_than_floats_reach() -> None:
    (param,) = vectors([[1.0, 2.0]])
    optimizer = SAM([param], SGD, rho=RHO, eps=0.0, backend="eager")
    param.grad = torch.zeros_like(param)
    optimizer.first_step()
    assert param.tolist() == [1.0, 2.0]
    optimizer.restore()
    (param,) = vectors([[0.0]], torch.float32)
    optimizer = SAM([param], SGD, rho=0.25, eps=0.0, backend="eager")
    param.grad = torch.full_like(param, 1e-40)
    scale = torch.finfo(torch.float32).max  # and not 0.25e40
    expected = scale * param.grad.item()
    optimizer.first_step()
    assert param.item() == pytest.approx(expected, rel=1e-6)
    assert param.item() < 0.05


@pytest.mark.parametrize("max_norm", [None, 1.5])
@pytest.mark.parametrize("geometry", ["euclidean", "fisher"])
@pytest.mark.parametrize("method", [WSAM, GSAM])
def test_a_loss_scale_is_taken_out(method: Any, geometry: str, max_norm: float | None) -> None:
    results = []
    for scale in (1.0, 64.0):
        params = vectors(START)
        options = {**GEOMETRIES[geometry][0], "max_grad_norm": max_norm}
        optimizer = method(params, SGD, rho=RHO, lr=0.1, backend="eager", **options)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)

        def closure(params: Any = params, scaler: Any = scaler, optimizer: Any = optimizer) -> Any:
            optimizer.zero_grad()
            loss = sum((p.square().sum() ** 2 for p in params), torch.zeros(()))
            scaler.scale(loss).backward()
            return loss

        optimizer.step(closure, scaler=scaler)
        results.append([param.tolist() for param in params])
        assert results[-1] != START
    for found, expected in zip(*results, strict=True):
        assert found == pytest.approx(expected, rel=1e-12)


def test_an_overflow_that_the_scaler_found_skips_the_step() -> None:
    params = vectors(START)
    optimizer = WSAM(params, SGD, lr=0.1, restore="backup", backend="eager")
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    factors = iter([1.0, math.inf])

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = sum((p.sum() for p in params), torch.zeros(())) * next(factors)
        scaler.scale(loss).backward()
        return loss

    optimizer.step(closure, scaler=scaler)
    scaler.update()
    assert [param.tolist() for param in params] == START
    assert scaler.get_scale() == 2.0


def test_lists_of_two_dtypes_share_one_norm() -> None:
    params = [*vectors(START[:1], torch.float32), *vectors(START[1:])]
    optimizer = SAM(params, SGD, rho=RHO, backend="eager")
    give(params, GRADIENTS[0])
    optimizer.first_step()
    scalars = optimizer._engine.scalars  # type: ignore[union-attr]
    assert scalars[Slot.GRAD1_SQ].item() == pytest.approx(norm_of(GRADIENTS[0]) ** 2)
    moved = [p.double() - torch.tensor(w) for p, w in zip(params, START, strict=True)]
    assert torch.cat(moved).norm().item() == pytest.approx(RHO, rel=1e-6)


def test_a_foreign_optimizer_is_fed_the_same() -> None:
    class Foreign(SGD):
        pass

    for options in ({}, {"maximize": True, "momentum": 0.9}):
        results = []
        for base in (SGD, Foreign):
            params = vectors(START)
            optimizer = WSAM(params, base, rho=RHO, gamma=0.75, lr=0.1, backend="eager", **options)
            for _ in range(2):
                for evaluation in range(2):
                    give(params, GRADIENTS[evaluation])
                    call(optimizer, evaluation)
            results.append([param.tolist() for param in params])
        for found, expected in zip(*results, strict=True):
            assert found == pytest.approx(expected, rel=1e-13)


def test_the_reference_is_always_there() -> None:
    assert eager.unavailable() is None
    assert eager.device_problem(torch.device("cpu")) is None
    assert (eager.DEVICE_TYPES, eager.DTYPES, eager.GRADIENT_DTYPES) == ((), (), {})


# ---- noise and chance, with whole numbers --------------------------------------------------------

ONES = 2**32 - 1


def hashed(x: int) -> int:
    x &= ONES
    x = (x ^ x >> 16) * 0x7FEB352D & ONES
    x = (x ^ x >> 15) * 0x846CA68B & ONES
    return x ^ x >> 16


def beginning(seed: int, key: int) -> int:
    return hashed(hashed(hashed(seed & ONES) + (seed >> 32)) + key)


@pytest.mark.parametrize("seed", [0, 12345, 2**40 + 12345])
def test_noise_is_in_the_order_of_memory(seed: int) -> None:
    tensors = [torch.zeros(70), torch.zeros(5, 9).t(), torch.zeros(2, 3, 4).transpose(0, 2)]
    params = [torch.nn.Parameter(tensor.double()) for tensor in tensors]
    assert not params[1].is_contiguous()
    optimizer = RWSAM(params, SGD, delta=0.5, backend="eager")
    engine = optimizer._begin_without_gradients()
    with torch.no_grad():
        engine.probe(seed)
    for key, param in enumerate(params):
        memory = param.detach().as_strided((param.numel(),), (1,))
        start = beginning(seed, key)
        bits = [
            hashed(start + (index >> 5) * 0x9E3779B9) >> (index & 31) & 1
            for index in range(param.numel())
        ]
        assert memory.tolist() == [0.5 * (2 * bit - 1) for bit in bits]
    with torch.no_grad():
        engine.return_to_weights()
    assert not any(param.any() for param in params)


def by_chance(value: float, key: int, step: int, operand: int, index: int) -> float:
    """Cut float32 to bfloat16, one up as often as the bits that are cut say."""
    (bits,) = struct.unpack("<I", struct.pack("<f", value))
    of_tensor = hashed(beginning(0, key) + step)
    bits += hashed(of_tensor + operand * 0x85EBCA6B + index * 0x9E3779B9) >> 16
    return float(struct.unpack("<f", struct.pack("<I", bits & 0xFFFF0000))[0])


def test_rounding_by_chance_bit_by_bit() -> None:
    torch.manual_seed(1)
    values = [torch.randn(40).to(torch.bfloat16), torch.randn(6, 7).to(torch.bfloat16).t()]
    params = [torch.nn.Parameter(value.clone()) for value in values]
    optimizer = SAM(
        params,
        functools.partial(SGD, lr=0.01, momentum=0.5),
        rho=0.0,
        state_dtype="parameter",
        stochastic_rounding=True,
        backend="eager",
    )
    gradients = [torch.randn_like(value) for value in values]
    ups = 0
    for step in range(2):
        before = [memory_of(param) for param in params]
        buffers = [
            memory_of(optimizer.state[p].get("momentum_buffer", torch.zeros_like(p)))
            for p in params
        ]
        for _ in range(2):
            for param, gradient in zip(params, gradients, strict=True):
                param.grad = gradient.clone()
            call(optimizer, _)
        for key, param in enumerate(params):
            gradient = memory_of(gradients[key])
            speed = [0.5 * v + g for v, g in zip(buffers[key], gradient, strict=True)]
            exact = [w - 0.01 * v for w, v in zip(before[key], speed, strict=True)]
            expected = [by_chance(x, key, step, 0, j) for j, x in enumerate(exact)]
            assert memory_of(param) == expected
            found = memory_of(optimizer.state[param]["momentum_buffer"])
            assert found == [by_chance(x, key, step, 1, j) for j, x in enumerate(speed)]
            nearest = torch.tensor(exact).to(torch.bfloat16).tolist()
            ups += sum(a != b for a, b in zip(expected, nearest, strict=True))
    assert ups > 10, "chance has to differ from the nearest number now and then"


def test_chance_leaves_what_is_not_finite_and_wider_parameters() -> None:
    param = torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    optimizer = SAM([param], SGD, lr=1e30, rho=0.0, stochastic_rounding=True, backend="eager")
    for evaluation in range(2):
        param.grad = torch.tensor([1e20, -1e20], dtype=torch.bfloat16)
        call(optimizer, evaluation)
    assert param.tolist() == [-math.inf, math.inf]
    (wide,) = vectors([[0.1]])
    optimizer = SAM([wide], SGD, lr=0.1, rho=0.0, stochastic_rounding=True, backend="eager")
    for evaluation in range(2):
        wide.grad = torch.ones_like(wide)
        call(optimizer, evaluation)
    assert wide.item() == 0.1 - 0.1 * 1.0


def memory_of(tensor: Tensor) -> list[float]:
    values: list[float] = tensor.detach().as_strided((tensor.numel(),), (1,)).tolist()
    return values


def test_float32_weights_beside_16_bits() -> None:
    """What the parameter cannot hold stays in them; the perturbation goes from them."""
    param = torch.nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.bfloat16))
    optimizer = SAM([param], SGD, lr=1e-3, rho=0.5, master_weights=True, backend="eager")
    weights = [1.0, -2.0]
    for _ in range(3):
        for evaluation in range(2):
            param.grad = torch.tensor([0.75, -1.0], dtype=torch.bfloat16)
            call(optimizer, evaluation)
            if evaluation == 0:
                along = [0.75, -1.0]
                moved = [w + 0.5 * g / 1.25 for w, g in zip(weights, along, strict=True)]
                assert param.tolist() == torch.tensor(moved).to(torch.bfloat16).tolist()
        weights = [w - 1e-3 * g for w, g in zip(weights, [0.75, -1.0], strict=True)]
        assert optimizer.state[param]["master_weight"].tolist() == pytest.approx(weights, rel=1e-6)
        assert param.tolist() == torch.tensor(weights).to(torch.bfloat16).tolist()
