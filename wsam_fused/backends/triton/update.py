# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""update: restore w, form h and d, step the base rule, subtract lr d; one pass over memory."""

from __future__ import annotations

from typing import Any

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]

from wsam_fused.backends.triton.constants import (
    AT_RUN_TIME,
    FLAG,
    POINT,
    ROW,
    RULES,
    SLOT,
    TRITON_DTYPES,
    block_size,
    compute_dtype,
    options,
)
from wsam_fused.backends.triton.math import all_finite
from wsam_fused.backends.triton.update_segment import (
    Step,
    has_gradients,
    step_segment,
    tensor_scalars,
)
from wsam_fused.backends.triton.walk import (
    cell,
    is_last_program,
    last_tensor,
    segment,
)
from wsam_fused.base_rules import BaseRule
from wsam_fused.tensor_list import TensorList

_TENSORS = 256


@triton.jit
def _finish(
    table,
    scalars,
    flags,
    steps,
    tensors,
    step,
    count_skipped,
    RULE: tl.constexpr,
    TENSORS: tl.constexpr,
):
    """Count the step, when no other program reads what is written here."""
    if step.skipped:
        if count_skipped != 0:
            tl.store(scalars + SLOT.value.SKIPPED, tl.load(scalars + SLOT.value.SKIPPED) + 1.0)
    elif RULE != RULES.value.NONE:
        for first in range(0, tensors, TENSORS):
            tensor = first + tl.arange(0, TENSORS)
            there = tensor < tensors
            # Lanes behind the last tensor ask for it again, and write nothing.
            has = has_gradients(table, tensors, tl.minimum(tensor, tensors - 1), step.required)
            age = tl.load(steps + tensor, mask=there, other=0.0)
            tl.store(steps + tensor, age + 1.0, mask=there & has)
    tl.store(flags + FLAG.value.AT, 0.0)


@triton.jit(do_not_specialize=AT_RUN_TIME)
def _update_kernel(
    table,
    first_tensor,
    groups,
    scalars,
    flags,
    steps,
    tensors,
    chunks,
    chunk_size,
    required,
    checked,
    keep_point,
    count_skipped,
    rounding_seed,
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
    TENSORS: tl.constexpr,
):
    """From w = fma(-s, g1, p), the backup, or p itself, to w' = rule(w, h; state) - lr d.

    h = sum of h_k g_k, d = sum of d_k g_k; sign and clipping are in the coefficients.

    operand  row             access
    p        kParam          read (where w is recomputed or p itself) and written
    g1..g3   kGrad1..kGrad3  as many as EVALUATIONS; read; written by NONE: h into g1, d into g2,
                             h into g2 where there is no g1
    backup   kBackup         read, only with HAS_BACKUP; of another dtype than p it is float32
                             weights: read, unless FROM_POINT, and written
    state    kState1..3      read and written
    steps    -               float32, one per tensor: read, and 1 added where a rule was stepped

    Moves 8 elements per parameter with Adam, 6 with momentum, one more with float32 weights. A
    tensor that lacks a required gradient is restored and not updated; a step with a norm that is
    not finite updates nothing.
    """
    at = tl.load(flags + FLAG.value.AT).to(tl.int32)
    skipped = all_finite(scalars, checked) == 0
    step = Step(skipped, at, required, keep_point, rounding_seed + tl.zeros((), tl.int64))
    # Of the tensor that comes first, unless the table is not walked at all.
    tensor = tl.load(first_tensor + tl.program_id(0)).to(tl.int32)
    group = cell(table, ROW.value.GROUP, tensors, tensor).to(tl.int32)
    known = tensor_scalars(groups, scalars, group, tl.load(steps + tensor), at, T, RULE)
    unmoved = at == POINT.value.WEIGHTS
    chunk = tl.where(step.skipped & unmoved, chunks, tl.program_id(0))
    while chunk < chunks:
        tensor = tl.load(first_tensor + chunk).to(tl.int32)
        last = last_tensor(first_tensor, chunk, tensors, chunks)
        while tensor <= last:
            group = cell(table, ROW.value.GROUP, tensors, tensor).to(tl.int32)
            age = tl.load(steps + tensor)
            if (group != known.group) | (age != known.age):
                known = tensor_scalars(groups, scalars, group, age, at, T, RULE)
            begin, count = segment(table, tensors, tensor, chunk, chunk_size)
            # fmt: off
            step_segment(
                table, tensors, tensor, begin, count, step, known,
                P, W, S, G, T, RULE, EVALUATIONS, HAS_BACKUP, FROM_POINT, BY_CHANCE, BLOCK,
            )
            # fmt: on
            tensor += 1
        chunk += tl.num_programs(0)
    # Only now does no other program read the flags, the steps and the scalars any more.
    if is_last_program(flags):
        _finish(table, scalars, flags, steps, tensors, step, count_skipped, RULE, TENSORS)


def programs_per_processor(dtype: torch.dtype, rule: BaseRule) -> int:
    """How many share a multiprocessor: as many as leave them the registers that they need.

    At most 64 a thread without a state; with one 80, with more in float64 128.
    """
    states = len(rule.state_keys)
    if states == 0:
        return 4
    return 2 if states > 1 and dtype == torch.float64 else 3


def _widest(
    dtype: torch.dtype, rule: BaseRule, state_dtype: torch.dtype, *, has_master: bool
) -> torch.dtype:
    """Return the dtype of which a thread's elements fill a vector.

    That is the widest of weights and states; with two states at least float32: for the eight
    elements of a vector of 16 bits there are too few registers.
    """
    stored = [compute_dtype(dtype) if has_master else dtype]
    if rule.state_keys:
        stored.append(state_dtype)
    if len(rule.state_keys) > 1:
        stored.append(torch.float32)
    return max(stored, key=lambda d: d.itemsize)


def launch(
    tensors: TensorList,
    programs: int,
    rule: BaseRule,
    evaluations: int,
    *,
    required: int,
    checked: int,
    keep_point: bool,
    count_skipped: bool,
) -> None:
    """Launch on the current stream of the current device, without waiting for anything."""
    table, key = tensors.table, tensors.key
    assert table is not None
    _update_kernel[(programs,)](
        table.table,
        table.chunks,
        tensors.shared.groups,
        tensors.shared.scalars,
        tensors.flags,
        tensors.steps,
        table.table.shape[1],
        table.chunks.shape[0],
        table.chunk_size,
        required,
        checked,
        int(keep_point),
        int(count_skipped),
        tensors.rounding_seed,
        **operands(
            key.dtype,
            tensors.grad_dtype,
            rule,
            evaluations,
            table.chunk_size,
            has_backup=tensors.backups is not None,
            state_dtype=key.state_dtype,
            has_master=key.has_master,
            keep_point=keep_point,
            by_chance=rule != BaseRule.NONE and tensors.rounding_seed >= 0,
        ),
        **options(programs_per_processor(key.dtype, rule)),
    )


def operands(
    dtype: torch.dtype,
    grad_dtype: torch.dtype,
    rule: BaseRule,
    evaluations: int,
    chunk_size: int,
    *,
    has_backup: bool,
    state_dtype: torch.dtype | None = None,
    has_master: bool = False,
    keep_point: bool = False,
    by_chance: bool = False,
) -> dict[str, Any]:
    """What the kernel is compiled for; ``state_dtype`` is at least float32 by default."""
    wide = compute_dtype(dtype)
    states = state_dtype or wide
    widest = _widest(dtype, rule, states, has_master=has_master)
    return {
        "P": TRITON_DTYPES[dtype],
        "W": TRITON_DTYPES[wide if has_master else dtype],
        "S": TRITON_DTYPES[states],
        "G": TRITON_DTYPES[grad_dtype],
        "T": TRITON_DTYPES[wide],
        "RULE": int(rule),
        "EVALUATIONS": evaluations,
        "HAS_BACKUP": has_backup,
        # Only then it is decided here: otherwise the source is where the update starts from.
        "FROM_POINT": has_master and keep_point,
        "BY_CHANCE": by_chance,
        "BLOCK": block_size(widest, chunk_size),
        "TENSORS": _TENSORS,
    }
