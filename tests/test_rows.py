"""The rows of the methods, the base rules and what follows from norms, number by number.

No step is made here: these are the tables that every backend is given, against the equations.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from typing import Any

import pytest
import torch
from torch.optim import SGD, Adam, AdamW, RMSprop

from wsam_fused import BSAM, ESAM, GNP, GSAM, RWSAM, SAM, WSAM
from wsam_fused.base_rules import (
    BaseRule,
    Hyper,
    check_base,
    device_learning_rate,
    has_fused_update,
    hyper_of,
    rule_of,
)
from wsam_fused.coefficients import clip_factor, derived, with_the_perturbation_of
from wsam_fused.groups import group_row
from wsam_fused.plan import Slot
from wsam_fused.row import BASE_ROW, DERIVED, Row, Sums

METHODS = {cls.__name__: cls for cls in (SAM, WSAM, GSAM, GNP, BSAM, ESAM, RWSAM)}


def optimizer_of(method: Any, base: Any = SGD, **options: Any) -> Any:
    return method([torch.nn.Parameter(torch.ones(2))], base, lr=0.1, **options)


def scalar(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


def sums(
    norm1: float = 1.0, norm2: float = 1.0, norm3: float = 1.0, dot12: float = 1.0, eps: float = 0.0
) -> Sums:
    return Sums(scalar(norm1), scalar(norm2), scalar(norm3), scalar(dot12), eps)


# ---- rows ----------------------------------------------------------------------------------------

NOTHING = (0.0, 0.0, 0.0)
ROWS: list[tuple[str, dict[str, Any], tuple[float, ...], tuple[float, ...]]] = [
    ("SAM", {}, (0.0, 1.0, 0.0), NOTHING),
    ("ESAM", {}, (0.0, 1.0, 0.0), NOTHING),
    ("RWSAM", {}, (0.0, 1.0, 0.0), NOTHING),
    ("WSAM", {"gamma": 0.75}, (1.0, 0.0, 0.0), (-3.0, 3.0, 0.0)),
    ("WSAM", {"gamma": 0.75, "decouple": False}, (-2.0, 3.0, 0.0), NOTHING),
    ("GNP", {"alpha": 0.25}, (0.75, 0.25, 0.0), NOTHING),
]


@pytest.mark.parametrize(("method", "options", "h", "d"), ROWS)
def test_rows_of_numbers(method: str, options: Any, h: Any, d: Any) -> None:
    optimizer = optimizer_of(METHODS[method], **options)
    assert optimizer.row(optimizer.param_groups[0]) == Row(evaluations=2, h=h, d=d)


def test_a_row_is_shared_by_optimizers_and_cannot_be_changed() -> None:
    first, second = (optimizer_of(SAM) for _ in range(2))
    row = first.row(first.param_groups[0])
    assert row is second.row(second.param_groups[0])
    with pytest.raises(dataclasses.FrozenInstanceError):
        row.evaluations = 3


def test_a_step_of_the_base_optimizer() -> None:
    assert BASE_ROW == Row(1, (1.0, 0.0, 0.0), (0.0, 0.0, 0.0), None, False)


@pytest.mark.parametrize(
    ("found", "h2"),
    [
        (sums(norm1=3.0, norm2=2.0, dot12=4.0), 1.5),  # cos 2/3, along 2/3 3/2 = 1
        (sums(norm1=2.0, norm2=1.0, dot12=3.0, eps=1.0), 1.5),  # cos 3/3, along 2/2
        (sums(norm1=1.0, norm2=1.0, dot12=1.0, eps=1.0), 1.125),  # cos 1/2, along 1/4
        (sums(norm1=0.0, norm2=2.0, dot12=0.0), 1.0),
        (sums(norm1=2.0, norm2=0.0, dot12=0.0), 1.0),
        (sums(norm1=2.0, norm2=0.5, dot12=-1.0), -1.0),
    ],
)
def test_the_row_of_gsam(found: Sums, h2: float) -> None:
    optimizer = optimizer_of(GSAM, alpha=0.5)
    row = optimizer.row(optimizer.param_groups[0])
    assert (row.evaluations, row.needs_dot, row.d) == (2, True, NOTHING)
    assert (row.h[0], row.h[1] is DERIVED, row.h[2]) == (-0.5, True, 0.0)
    columns = row.derive(found)
    assert list(columns) == ["h2"]
    assert columns["h2"].item() == pytest.approx(h2)


@pytest.mark.parametrize(("norm2", "norm3", "h3"), [(4.0, 2.0, -2.0), (1.0, 0.0, 0.0)])
def test_the_row_of_bsam(norm2: float, norm3: float, h3: float) -> None:
    optimizer = optimizer_of(BSAM)
    row = optimizer.row(optimizer.param_groups[0])
    assert (row.evaluations, row.needs_dot, row.d) == (3, False, NOTHING)
    assert (row.h[:2], row.h[2] is DERIVED) == ((1.0, 1.0), True)
    columns = row.derive(sums(norm2=norm2, norm3=norm3))
    assert {name: value.item() for name, value in columns.items()} == {"h3": h3}


def test_what_the_methods_are() -> None:
    found = {
        name: (cls.evaluations, cls.required, cls.uses_first_gradient, cls.takes_microbatches)
        for name, cls in METHODS.items()
    }
    assert found == {
        "SAM": (2, 0b11, False, True),
        "WSAM": (2, 0b11, True, True),
        "GSAM": (2, 0b11, True, True),
        "GNP": (2, 0b11, True, True),
        "BSAM": (3, 0b111, True, False),
        "ESAM": (2, 0b10, False, False),
        "RWSAM": (2, 0b11, False, False),
    }
    assert {name for name, cls in METHODS.items() if cls.scheduled != ("rho",)} == {"BSAM"}
    assert BSAM.scheduled == ("rho", "rho_min")


def test_default_hyper_parameters() -> None:
    """Those of the papers; README.md and docs/methods.md say them."""
    found = {}
    for name, cls in METHODS.items():
        group = optimizer_of(cls).param_groups[0]
        own = optimizer_of(cls)._method_keys.values(group)
        found[name] = {k: v for k, v in own.items() if k not in ("geometry", "eta")}
    assert found == {
        "SAM": {"rho": 0.05},
        "WSAM": {"rho": 0.05, "gamma": 0.9},
        "GSAM": {"rho": 0.05, "alpha": 0.4},
        "GNP": {"rho": 0.1, "alpha": 0.8},
        "BSAM": {"rho": 0.05, "rho_min": 0.05},
        "ESAM": {"rho": 0.05, "beta": 0.5, "gamma": 0.5, "seed": 0},
        "RWSAM": {"rho": 0.05, "lam": 0.5, "delta": 1e-3, "seed": 0},
    }
    assert optimizer_of(WSAM).decouple is True
    assert optimizer_of(BSAM).as_published is False


EDGES = [
    ("WSAM", "gamma", [0.0, 0.999], [1.0, -1e-9]),
    ("GSAM", "alpha", [0.0, 5.0], [-1e-9]),
    ("GNP", "alpha", [0.0, 1.0], [-1e-9, 1.0 + 1e-9]),
    ("BSAM", "rho_min", [0.0, 5.0], [-1e-9]),
    ("ESAM", "beta", [1e-9, 1.0], [0.0, 1.0 + 1e-9]),
    ("ESAM", "gamma", [1e-9, 1.0], [0.0, 1.0 + 1e-9]),
    ("RWSAM", "lam", [0.0, 5.0], [-1e-9]),
    ("RWSAM", "delta", [1e-9, 5.0], [0.0]),
    *((method, "rho", [0.0, 5.0], [-1e-9, math.inf]) for method in METHODS),
    *((method, "eta", [0.0, 5.0], [-1e-9]) for method in METHODS),
]


@pytest.mark.parametrize(("method", "name", "inside", "outside"), EDGES)
def test_the_edges_of_ranges(method: str, name: str, inside: Any, outside: Any) -> None:
    for value in inside:
        optimizer = optimizer_of(METHODS[method], **{name: value})
        optimizer.row(optimizer.param_groups[0])
        optimizer._check_values(optimizer.param_groups[0])
    for value in outside:
        with pytest.raises(ValueError, match=f"{name} is .*, expected a number"):
            optimizer_of(METHODS[method], **{name: value})
    if name in ("rho", "eta"):
        return
    if method in ("WSAM", "GSAM", "GNP"):  # also where it was changed while training
        for value in inside:
            optimizer.param_groups[0][name] = value
            assert optimizer.row(optimizer.param_groups[0]).evaluations == 2
        for value in outside:
            optimizer.param_groups[0][name] = value
            with pytest.raises(ValueError, match=f"{name} is .*, expected a number"):
                optimizer.row(optimizer.param_groups[0])


def test_copies_are_of_the_same_variant() -> None:
    assert copy.deepcopy(optimizer_of(WSAM, decouple=False)).decouple is False
    assert copy.deepcopy(optimizer_of(BSAM, as_published=True)).as_published is True


def test_esam_perturbs_by_rho_over_beta() -> None:
    optimizer = optimizer_of(ESAM, rho=0.3, beta=0.25)
    group = optimizer.param_groups[0]
    assert optimizer._places(group)["rho"] == pytest.approx(1.2)
    group["beta"] = 1.0
    assert optimizer._places(group)["rho"] == 0.3
    group["beta"] = 0.0
    with pytest.raises(ValueError, match=r"beta is 0.0, expected a number"):
        optimizer._places(group)


# ---- coefficients that follow from norms ---------------------------------------------------------


def test_clipping_factors() -> None:
    assert clip_factor(1.0, scalar(4.0)).item() == pytest.approx(1 / (4 + 1e-6), rel=1e-15)
    assert clip_factor(5.0, scalar(1.0)).item() == 1.0
    assert clip_factor(0.5, scalar(0.0)).item() == 1.0


def rows_and_scalars(max_norm: float, sign: float) -> tuple[Any, torch.Tensor]:
    group = {"lr": 0.1, "maximize": sign < 0, "weight_decay": 0.0, "momentum": 0.0}
    group |= {"dampening": 0.0, "nesterov": False}
    row = group_row(group, BaseRule.SGD, BASE_ROW, {}, 0.25, max_norm)
    scalars = torch.zeros(len(Slot), dtype=torch.float64)
    scalars[Slot.GRAD1_SQ], scalars[Slot.GRAD2_SQ], scalars[Slot.GRAD3_SQ] = 36.0, 400.0, 144.0
    scalars[Slot.DOT12] = 50.0
    # The gradients in memory are multiplied by 2, 4 and 1: norms 3, 5 and 12.
    scalars[Slot.INV_SCALE1], scalars[Slot.INV_SCALE2], scalars[Slot.INV_SCALE3] = 0.5, 0.25, 1.0
    return row, scalars


@pytest.mark.parametrize(
    ("max_norm", "expected"),
    [
        (-1.0, (3.0, 5.0, 12.0, 50.0 / 8)),
        (4.0, (3.0, 4.0, 4.0, 50.0 / 8 * 0.8)),
        (0.0, (0.0, 0.0, 0.0, 0.0)),
    ],
)
def test_sums_are_of_the_true_gradients_as_they_are_clipped(max_norm: float, expected: Any) -> None:
    row, scalars = rows_and_scalars(max_norm, 1.0)
    seen: list[Sums] = []

    def derive(found: Sums) -> dict[str, torch.Tensor]:
        seen.append(found)
        return {"h2": scalar(2.0), "d1": scalar(3.0)}

    methods = [Row(2, (1.0, DERIVED, 0.0), derive=derive), BASE_ROW]
    columns = derived(scalars, [row, row], methods, foreign=False)
    assert columns == [{"h2": scalar(2.0), "d1": scalar(3.0)}, {}]
    assert [float(value) for value in seen[0]] == pytest.approx([*expected, 0.25], rel=1e-6)


@pytest.mark.parametrize(
    ("foreign", "sign", "h2"), [(False, -1.0, 2.0), (True, 1.0, 2.0), (True, -1.0, -2.0)]
)
def test_a_foreign_optimizer_that_maximizes_gets_the_sign_undone(
    foreign: bool, sign: float, h2: float
) -> None:
    row, scalars = rows_and_scalars(-1.0, sign)
    columns = {"h2": scalar(2.0), "d1": scalar(3.0)}
    method = Row(2, (1.0, DERIVED, 0.0), derive=lambda _: columns)
    assert derived(scalars, [row], [method], foreign=foreign) == [{"h2": h2, "d1": 3.0}]


def test_the_radii_of_the_perturbation_are_kept_and_nothing_else() -> None:
    row, _ = rows_and_scalars(-1.0, 1.0)
    before = [row._replace(rho=1.0, rho_descent=2.0, lr=0.5)]
    now = [row._replace(rho=3.0, rho_descent=4.0, lr=0.7)]
    kept = with_the_perturbation_of(before, now)
    assert kept == [row._replace(rho=1.0, rho_descent=2.0, lr=0.7)]
    with pytest.raises(RuntimeError, match="maximize was changed while the weights are perturbed"):
        with_the_perturbation_of(before, [row._replace(sign=-1.0)])


# ---- base rules ----------------------------------------------------------------------------------


def group_of(base: Any, **options: Any) -> dict[str, Any]:
    return base([torch.nn.Parameter(torch.ones(2))], lr=0.5, **options).param_groups[0]


RULES: list[tuple[Any, dict[str, Any], BaseRule, Hyper]] = [
    (SGD, {}, BaseRule.SGD, Hyper(0.5, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)),
    (
        SGD,
        {"momentum": 0.9, "weight_decay": 0.1, "dampening": 0.3},
        BaseRule.MOMENTUM,
        Hyper(0.5, 0.1, 0.0, 0.9, 0.3, 0.0, 0.0),
    ),
    (
        SGD,
        {"momentum": 0.9, "nesterov": True},
        BaseRule.MOMENTUM,
        Hyper(0.5, 0.0, 0.0, 0.9, 0.0, 0.0, 1.0),
    ),
    (
        Adam,
        {"weight_decay": 0.1},
        BaseRule.ADAM,
        Hyper(0.5, 0.1, 0.0, 0.9, 0.999, 1e-8, 0.0),
    ),
    (
        AdamW,
        {"weight_decay": 0.1, "eps": 1e-3, "amsgrad": True},
        BaseRule.AMSGRAD,
        Hyper(0.5, 0.0, 0.1, 0.9, 0.999, 1e-3, 0.0),
    ),
    (RMSprop, {"weight_decay": 0.1}, BaseRule.NONE, Hyper(0.5, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)),
]


@pytest.mark.parametrize(("base", "options", "rule", "hyper"), RULES)
def test_rules_and_hyper_parameters(base: Any, options: Any, rule: BaseRule, hyper: Any) -> None:
    group = group_of(base, **options)
    assert rule_of(base, group) == rule
    assert has_fused_update(base) == (rule != BaseRule.NONE)
    assert hyper_of(rule, group) == hyper


def test_state_keys_and_numbers_of_the_rules() -> None:
    """The numbers are those of ``csrc/plan.h``, the keys those of torch."""
    assert [(rule.name, int(rule)) for rule in BaseRule] == [
        ("NONE", 0),
        ("SGD", 1),
        ("MOMENTUM", 2),
        ("ADAM", 3),
        ("AMSGRAD", 4),
    ]
    assert [rule.state_keys for rule in BaseRule] == [
        (),
        (),
        ("momentum_buffer",),
        ("exp_avg", "exp_avg_sq"),
        ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
    ]
    assert [rule.keeps_step for rule in BaseRule] == [False, False, False, True, True]


def test_a_subclass_has_no_fused_update() -> None:
    class Mine(AdamW):
        pass

    assert not has_fused_update(Mine)
    assert rule_of(Mine, group_of(AdamW)) == BaseRule.NONE


def test_a_learning_rate_that_only_a_device_knows() -> None:
    lr = torch.tensor(0.5, device="meta")
    assert device_learning_rate({"lr": lr}) is lr
    assert device_learning_rate({"lr": torch.tensor(0.5)}) is None
    assert device_learning_rate({"lr": 0.5}) is None
    assert device_learning_rate({}) is None
    for rule, base in ((BaseRule.NONE, RMSprop), (BaseRule.SGD, SGD), (BaseRule.ADAM, AdamW)):
        first, second = (hyper_of(rule, {**group_of(base), "lr": lr}) for _ in range(2))
        assert math.isnan(first.lr)
        assert first == second, "the same object, so that rows compare equal"
    on_device = torch.tensor(0.5, device="meta")
    for name, base in (("weight_decay", AdamW), ("momentum", SGD), ("dampening", SGD)):
        group = {**group_of(base), name: on_device}
        rule = BaseRule.MOMENTUM if base is SGD else BaseRule.ADAM
        with pytest.raises(TypeError, match=f"{name} is a tensor on meta"):
            hyper_of(rule, group)
    for name, value in (("betas", (0.9, on_device)), ("eps", on_device)):
        with pytest.raises(TypeError, match=f"{name} is a tensor on meta"):
            hyper_of(BaseRule.ADAM, {**group_of(AdamW), name: value})


GOOD: list[tuple[Any, dict[str, Any]]] = [
    (SGD, {"dampening": -0.5}),
    (SGD, {"nesterov": 1}),
    (AdamW, {"betas": [0.0, 0.0], "eps": 0.0}),
    (Adam, {"betas": (torch.tensor(0.5), 0.999), "amsgrad": True}),
]
BAD: list[tuple[Any, dict[str, Any], str]] = [
    (SGD, {"dampening": math.inf}, "dampening is inf"),
    (SGD, {"nesterov": "no"}, "nesterov is 'no', expected True or False"),
    (SGD, {"maximize": 2}, "maximize is 2, expected True or False"),
    (Adam, {"betas": (0.9, 1.0)}, "betas is 1.0, expected a number in"),
    (Adam, {"betas": (-1e-9, 0.9)}, "betas is -1e-09, expected a number in"),
    (Adam, {"betas": (0.9, 0.9, 0.9)}, r"betas is \(0.9, 0.9, 0.9\), expected two numbers"),
    (Adam, {"betas": 0.9}, "betas is 0.9, expected two numbers"),
    (AdamW, {"eps": -1e-9}, "eps is -1e-09"),
    (AdamW, {"amsgrad": None}, "amsgrad is None, expected True or False"),
    (AdamW, {"maximize": 0.0}, "maximize is 0.0, expected True or False"),
    (AdamW, {"decoupled_weight_decay": "x"}, "decoupled_weight_decay is 'x'"),
]


@pytest.mark.parametrize(("base", "values"), GOOD)
def test_good_values_of_base_optimizers(base: Any, values: dict[str, Any]) -> None:
    check_base(base, {**group_of(base), **values})
    optimizer = optimizer_of(SAM, functools.partial(base))
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))], **values})
    assert len(optimizer.param_groups) == 2


@pytest.mark.parametrize(("base", "values", "message"), BAD)
def test_bad_values_of_base_optimizers(base: Any, values: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        check_base(base, {**group_of(base), **values})
    optimizer = optimizer_of(SAM, base)
    with pytest.raises((TypeError, ValueError), match=message):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))], **values})
    assert len(optimizer.param_groups) == 1
