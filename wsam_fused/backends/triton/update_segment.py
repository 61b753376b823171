# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""What update does with one tensor within a chunk: where it is, its scalars, what is to be done."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]

from wsam_fused.backends.triton.constants import COLUMNS, POINT, ROW, RULES
from wsam_fused.backends.triton.math import (
    Chance,
    chance_of_tensor,
    coefficients,
    rule_scalars,
    scale_at,
)
from wsam_fused.backends.triton.update_block import Addresses, restore_or_update
from wsam_fused.backends.triton.walk import address, cell


@triton.jit
def addresses(
    table,
    tensors,
    tensor,
    begin,
    from_backup,
    P: tl.constexpr,
    W: tl.constexpr,
    S: tl.constexpr,
    G: tl.constexpr,
    RULE: tl.constexpr,
    EVALUATIONS: tl.constexpr,
    HAS_BACKUP: tl.constexpr,
):
    """Where everything of a segment is."""
    p = address(table, ROW.value.PARAM, tensors, tensor, begin, P)
    source, g2, g3, state1, state2, state3 = p, p, p, p, p, p
    g1 = address(table, ROW.value.GRAD1, tensors, tensor, begin, G)
    if HAS_BACKUP:
        source = address(table, ROW.value.BACKUP, tensors, tensor, begin, W)
        if W == P:
            source = tl.where(from_backup, source, p)
    if EVALUATIONS > 1:
        g2 = address(table, ROW.value.GRAD2, tensors, tensor, begin, G)
    if EVALUATIONS > 2:
        g3 = address(table, ROW.value.GRAD3, tensors, tensor, begin, G)
    if RULE >= RULES.value.MOMENTUM:
        state1 = address(table, ROW.value.STATE1, tensors, tensor, begin, S)
    if RULE >= RULES.value.ADAM:
        state2 = address(table, ROW.value.STATE2, tensors, tensor, begin, S)
    if RULE >= RULES.value.AMSGRAD:
        state3 = address(table, ROW.value.STATE3, tensors, tensor, begin, S)
    return Addresses(p, source, g1, g2, g3, state1, state2, state3)


@triton.jit
def has_gradients(table, tensors, tensor, required):
    """Whether the tensor, or each of a block of them, has gradient k + 1 for every bit k."""
    # Chosen by where: the interpreter makes numbers of a truth value that meets a block of them.
    first = tl.where(required & 1 != 0, cell(table, ROW.value.GRAD1, tensors, tensor), 1)
    second = tl.where(required & 2 != 0, cell(table, ROW.value.GRAD2, tensors, tensor), 1)
    third = tl.where(required & 4 != 0, cell(table, ROW.value.GRAD3, tensors, tensor), 1)
    return (first != 0) & (second != 0) & (third != 0)


class Step(NamedTuple):
    """What is the same for all segments of a launch."""

    skipped: Any
    at: Any
    required: Any
    keep_point: Any
    rounding_seed: Any


class TensorScalars(NamedTuple):
    """The scalars of the tensors of one group and age."""

    group: Any
    age: Any  # updates they have had
    perturbation: Any
    row: Any
    base: Any


@triton.jit
def tensor_scalars(groups, scalars, group, age, at, T: tl.constexpr, RULE: tl.constexpr):
    """Form the scalars; kept for the next tensor, because float64 is slow on many GPUs."""
    columns = groups + group * COLUMNS
    age = age + tl.zeros((), tl.float32)
    return TensorScalars(
        group,
        age,
        scale_at(at, scalars, columns, T),
        coefficients(columns, scalars, T),
        rule_scalars(columns, age.to(tl.float64) + 1.0, T, RULE),
    )


@triton.jit
def step_segment(
    table,
    tensors,
    tensor,
    begin,
    count,
    step,
    known,
    P: tl.constexpr,
    W: tl.constexpr,
    S: tl.constexpr,
    G: tl.constexpr,
    T: tl.constexpr,
    RULE: tl.constexpr,
    EVALUATIONS: tl.constexpr,
    HAS_BACKUP: tl.constexpr,
    FROM_POINT: tl.constexpr,
    BY_CHANCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Update what of a tensor lies in a chunk, or restore it, or leave it alone."""
    has_first = cell(table, ROW.value.GRAD1, tensors, tensor) != 0
    moved = (step.at != POINT.value.WEIGHTS) & has_first
    update = has_gradients(table, tensors, tensor, step.required) & (step.skipped == 0)
    restores = moved & ((update & (step.keep_point != 0)) == 0)
    # fmt: off
    at = addresses(
        table, tensors, tensor, begin, restores, P, W, S, G, RULE, EVALUATIONS, HAS_BACKUP
    )
    # fmt: on
    scale = tl.zeros((), T)
    if not HAS_BACKUP:
        scale = tl.where(restores, known.perturbation, scale)
    c = known.row
    if EVALUATIONS > 1:
        # Where g1 is not used, it is read from the place of g2, which is read anyway.
        used = (scale != 0) | (c.h1 != 0) | (c.d1 != 0) | (update == 0)
        if RULE == RULES.value.NONE:
            used = has_first
        g1 = tl.where(used, at.g1, at.g2)
        at = Addresses(at.p, at.source, g1, at.g2, at.g3, at.state1, at.state2, at.state3)
    of_tensor = tl.zeros((), tl.uint32)
    if BY_CHANCE:
        key = cell(table, ROW.value.KEY, tensors, tensor)
        of_tensor = chance_of_tensor(step.rounding_seed, key, known.age)
    if update | moved:
        # fmt: off
        restore_or_update(
            at, update, scale, c, known.base, Chance(of_tensor, begin), count,
            P, W, S, G, T, RULE, EVALUATIONS, HAS_BACKUP, FROM_POINT, BY_CHANCE, BLOCK,
        )
        # fmt: on
