# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""What update does with elements: block by block of one tensor within a chunk."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]

from wsam_fused.backends.triton.constants import REST, RULES
from wsam_fused.backends.triton.math import (
    adam_averages,
    adam_step,
    larger,
    momentum_step,
    recomputed,
    sgd_step,
    weighted,
)
from wsam_fused.backends.triton.perturb import restore_block
from wsam_fused.backends.triton.walk import load, store, store_rounded, whole_blocks


class Addresses(NamedTuple):
    """Where the elements of a segment are; what a kernel does not read has p's address."""

    p: Any
    source: Any  # where w is: p, the backup or the float32 weights
    g1: Any
    g2: Any
    g3: Any
    state1: Any
    state2: Any
    state3: Any


@triton.jit
def _row_of(
    c,
    at,
    index,
    count,
    G: tl.constexpr,
    T: tl.constexpr,
    EVALUATIONS: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """g1, h = sum of h_k g_k and d = sum of d_k g_k, added from the last gradient to the first."""
    g1 = load(at.g1, index, count, G, T, WHOLE)
    h = tl.zeros_like(g1)
    d = tl.zeros_like(g1)
    if EVALUATIONS > 2:
        g3 = load(at.g3, index, count, G, T, WHOLE)
        h = weighted(c.h3, g3, h)
        d = weighted(c.d3, g3, d)
    if EVALUATIONS > 1:
        g2 = load(at.g2, index, count, G, T, WHOLE)
        h = weighted(c.h2, g2, h)
        d = weighted(c.d2, g2, d)
    return g1, weighted(c.h1, g1, h), weighted(c.d1, g1, d)


@triton.jit
def _step_rule(
    w,
    h,
    s,
    at,
    chance,
    index,
    count,
    S: tl.constexpr,
    T: tl.constexpr,
    RULE: tl.constexpr,
    BY_CHANCE: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """W after a step of the base rule; reads and writes its state."""
    u = tl.fma(s.l2, w, h)
    if RULE == RULES.value.SGD:
        w = sgd_step(w, u, s)
    elif RULE == RULES.value.MOMENTUM:
        velocity = load(at.state1, index, count, S, T, WHOLE)
        w, velocity = momentum_step(w, u, velocity, s)
        store_rounded(at.state1, index, count, velocity, chance, 1, S, BY_CHANCE, WHOLE)
    else:
        average = load(at.state1, index, count, S, T, WHOLE)
        square = load(at.state2, index, count, S, T, WHOLE)
        if RULE == RULES.value.AMSGRAD:  # before anything is stored, which it would wait for
            largest = load(at.state3, index, count, S, T, WHOLE)
        average, square = adam_averages(u, average, square, s)
        store_rounded(at.state1, index, count, average, chance, 1, S, BY_CHANCE, WHOLE)
        store_rounded(at.state2, index, count, square, chance, 2, S, BY_CHANCE, WHOLE)
        if RULE == RULES.value.AMSGRAD:
            square = larger(largest, square)
            store_rounded(at.state3, index, count, square, chance, 3, S, BY_CHANCE, WHOLE)
        w = adam_step(w, average, square, s, T)
    return w


@triton.jit
def _update_block(
    at,
    scale,
    c,
    s,
    chance,
    index,
    count,
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
    WHOLE: tl.constexpr,
):
    if FROM_POINT:
        w = load(at.p, index, count, P, T, WHOLE)
    else:
        w = load(at.source, index, count, W, T, WHOLE)
    g1, h, d = _row_of(c, at, index, count, G, T, EVALUATIONS, WHOLE)
    if not HAS_BACKUP:
        w = recomputed(w, g1, scale)
    if RULE == RULES.value.NONE:
        if EVALUATIONS > 1:  # first: where there is no g1, h takes the place of g2
            store(at.g2, index, count, d, G, WHOLE)
        store(at.g1, index, count, h, G, WHOLE)
    else:
        w = _step_rule(w, h, s, at, chance, index, count, S, T, RULE, BY_CHANCE, WHOLE)
        w = tl.fma(-s.lr, d, w)
    store_rounded(at.p, index, count, w, chance, 0, P, BY_CHANCE, WHOLE)
    if W != P:
        store(at.source, index, count, w, W, WHOLE)


@triton.jit
def restore_or_update(
    at,
    update,
    scale,
    c,
    s,
    chance,
    count,
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
    """The blocks of one segment."""
    reached = at.p | at.source | at.g1 | at.g2 | at.g3 | at.state1 | at.state2 | at.state3
    whole = whole_blocks(reached, count, BLOCK)
    # fmt: off
    if update:
        for i in range(0, whole, BLOCK):
            index = i + tl.arange(0, BLOCK)
            _update_block(
                at, scale, c, s, chance, index, count,
                P, W, S, G, T, RULE, EVALUATIONS, HAS_BACKUP, FROM_POINT, BY_CHANCE, True,
            )
        for i in range(whole, count, REST):
            index = i + tl.arange(0, REST)
            _update_block(
                at, scale, c, s, chance, index, count,
                P, W, S, G, T, RULE, EVALUATIONS, HAS_BACKUP, FROM_POINT, BY_CHANCE, False,
            )
    else:  # rare: not worth vectors
        for i in range(0, count, REST):
            index = i + tl.arange(0, REST)
            restore_block(
                at.p, at.source, at.g1, scale, index, count, P, W, G, T, HAS_BACKUP, False
            )
    # fmt: on
