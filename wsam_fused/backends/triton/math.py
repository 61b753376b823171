# mypy: disable-error-code="assignment, no-untyped-def, no-untyped-call, untyped-decorator"
"""The arithmetic of the Triton kernels: that of ``csrc/math.h``, operation by operation.

Everything that a step needs once is formed in float64 and rounded to T, the type that elements are
computed in. Products that are added are written as fma, and nothing else is contracted
(``enable_fp_fusion=False``), so that the restore undoes the perturbation with the same operation.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]

from wsam_fused.backends.triton.constants import (
    COLUMN,
    DIRECTION,
    LARGEST_DOUBLE,
    LARGEST_FLOAT,
    POINT,
    RULES,
    SLOT,
)


@triton.jit
def is_finite(x):
    """Whether x is neither infinite nor NaN."""
    return tl.abs(x) < float("inf")


@triton.jit
def divided(a, b, T: tl.constexpr):
    """A / b, rounded to nearest; ``/`` alone is that in float64 only."""
    if T == tl.float64:
        quotient = a / b
    else:
        quotient = tl.div_rn(a, b)
    return quotient


@triton.jit
def square_root(x, T: tl.constexpr):
    """The root of x, rounded to nearest."""
    if T == tl.float64:
        root = tl.sqrt(x)
    else:
        root = tl.sqrt_rn(x)
    return root


@triton.jit
def larger(a, b):
    """max(a, b), where a NaN stays, as in ``torch.maximum``."""
    return tl.where((a > b) | (a != a), a, b)


# ---- the perturbation ---------------------------------------------------------------------------


@triton.jit
def metric(w, g, eta, GEOMETRY: tl.constexpr, T: tl.constexpr):
    """The metric M, for the geometries that have one."""
    if GEOMETRY == DIRECTION.value.ADAPTIVE:
        size = tl.abs(w) + eta
        m = size * size
    else:
        one = tl.full((), 1.0, T)
        m = divided(one, tl.fma(eta * g, g, one), T)
    return m


@triton.jit
def scaled_eta(scalars, group, GEOMETRY: tl.constexpr):
    """The eta of a metric for gradients that are multiplied by a loss scale."""
    eta = tl.load(group + COLUMN.value.eta)
    if GEOMETRY == DIRECTION.value.FISHER:
        inverse = tl.load(scalars + SLOT.value.INV_SCALE1)
        eta = eta * inverse * inverse
    return eta


@triton.jit
def step_to_radius(scalars, radius, group, T: tl.constexpr):
    """Radius / (norm + eps) with its sign, and 0 where the norm is 0.

    A scale beyond the range of T is held at its largest finite value. It goes with the gradient in
    memory, which is the gradient times a loss scale.
    """
    inverse = tl.load(scalars + SLOT.value.INV_SCALE1)
    norm = tl.sqrt(tl.load(scalars + SLOT.value.METRIC_SQ)) * inverse
    scale = radius / (norm + tl.load(group + COLUMN.value.ascent_eps)) * inverse
    scale = tl.where(norm > 0, scale, 0.0)
    if T == tl.float64:
        scale = tl.where(scale < LARGEST_DOUBLE, scale, LARGEST_DOUBLE)
    else:
        scale = tl.where(scale < LARGEST_FLOAT, scale, LARGEST_FLOAT)
    return (tl.load(group + COLUMN.value.sign) * scale).to(T)


@triton.jit
def scale_at(point, scalars, group, T: tl.constexpr):
    """What M g1, or the noise, is multiplied by to get from w to a point."""
    ascends = point == POINT.value.ASCENT
    radius = tl.load(group + tl.where(ascends, COLUMN.value.rho, COLUMN.value.rho_descent))
    scale = step_to_radius(scalars, radius, group, T)
    scale = tl.where(ascends, scale, -scale)
    delta = tl.load(group + COLUMN.value.delta).to(T)
    zero = tl.zeros((), T)
    scale = tl.where(point == POINT.value.PROBE, delta, scale)
    return tl.where(point == POINT.value.WEIGHTS, zero, scale)


@triton.jit
def perturbed(w, g, scale, eta, GEOMETRY: tl.constexpr, T: tl.constexpr):
    """P = fma(s, M g, w)."""
    if GEOMETRY == DIRECTION.value.ADAPTIVE or GEOMETRY == DIRECTION.value.FISHER:
        g = metric(w, g, eta, GEOMETRY, T) * g
    return tl.fma(scale, g, w)


@triton.jit
def recomputed(p, g, scale):
    """W = fma(-s, g, p): only where the metric is 1. A scale of 0 leaves p, bit for bit."""
    return tl.where(scale != 0, tl.fma(-scale, g, p), p)


# ---- noise --------------------------------------------------------------------------------------


@triton.jit
def hashed(x):
    """The hash of ``csrc/math.h``; x is uint32."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def noise_of_tensor(seed, key):
    """What the noise of a tensor begins with; the seed is int64."""
    low = hashed(seed.to(tl.uint32)) + (seed >> 32).to(tl.uint32)
    return hashed(hashed(low) + key.to(tl.uint32))


@triton.jit
def noise_at(of_tensor, begin, index, T: tl.constexpr):
    """-1 or 1 for the elements ``index`` behind ``begin``, a multiple of 32."""
    place = (begin >> 5).to(tl.uint32) + (index >> 5).to(tl.uint32)
    word = hashed(of_tensor + place * 0x9E3779B9)
    one = tl.full((), 1.0, T)
    return tl.where(((word >> (index & 31).to(tl.uint32)) & 1) != 0, one, -one)


# ---- bfloat16 by chance -------------------------------------------------------------------------


class Chance(NamedTuple):
    """What the chances of the elements of a segment follow from."""

    of_tensor: Any
    begin: Any  # the segment's first element


@triton.jit
def chance_of_tensor(seed, key, age):
    """What the chances of a tensor begin with; age is how many updates it has had."""
    return hashed(noise_of_tensor(seed, key) + age.to(tl.uint32))


@triton.jit
def rounded_by_chance(values, chance, index, OPERAND: tl.constexpr):
    """The bits of float32 values as bfloat16, up with the probability that the value asks for.

    OPERAND is 0 for p and 1 to 3 for the states, ``index`` counts from the segment's first element.
    """
    shift: tl.constexpr = OPERAND * 0x85EBCA6B & 0xFFFFFFFF
    place = (chance.begin + index).to(tl.uint32)
    odds = hashed(chance.of_tensor + shift + place * 0x9E3779B9) >> 16
    bits = values.to(tl.uint32, bitcast=True)
    # What is not finite stays so.
    finite = (bits & 0x7F800000) != 0x7F800000
    quiet = tl.where((bits & 0x007FFFFF) != 0, bits | 0x00400000, bits)
    return (tl.where(finite, bits + odds, quiet) >> 16).to(tl.uint16)


# ---- the coefficients of a step -----------------------------------------------------------------


class Coefficients(NamedTuple):
    """Weights of the gradients in memory in h and d, with sign and clipping; of type T."""

    h1: Any
    h2: Any
    h3: Any
    d1: Any
    d2: Any
    d3: Any


@triton.jit
def all_finite(scalars, checked):
    """Whether the norms are finite that are known; a step in which one is not updates nothing."""
    found = tl.load(scalars + SLOT.value.FOUND_INF)
    finite = is_finite(tl.load(scalars + SLOT.value.METRIC_SQ))
    finite = (finite & is_finite(tl.load(scalars + SLOT.value.GRAD1_SQ))) | (checked & 1 == 0)
    second = is_finite(tl.load(scalars + SLOT.value.GRAD2_SQ)) | (checked & 2 == 0)
    third = is_finite(tl.load(scalars + SLOT.value.GRAD3_SQ)) | (checked & 4 == 0)
    return finite & second & third & (found == 0)


@triton.jit
def clip_factor(norm, max_norm):
    """min(1, max_norm / (norm + 1e-6)); a negative max_norm is none."""
    factor = max_norm / (norm + 1e-6)
    return tl.where((max_norm >= 0) & (factor < 1), factor, 1.0)


@triton.jit
def _inverse_scale(scalars, K: tl.constexpr):
    """1 / loss scale of gradient K + 1.

    Read wherever it is needed: kept, it takes registers of the loop over elements (seen as spills).
    """
    return tl.load(scalars + SLOT.value.INV_SCALE1 + K, volatile=True)


@triton.jit
def _factor(scalars, group, K: tl.constexpr):
    """What the weights of gradient K + 1 are multiplied by: its sign, clipping and loss scale."""
    norm = tl.sqrt(tl.load(scalars + SLOT.value.GRAD1_SQ + K)) * _inverse_scale(scalars, K)
    clip = clip_factor(norm, tl.load(group + COLUMN.value.max_norm))
    return tl.load(group + COLUMN.value.sign) * clip * _inverse_scale(scalars, K)


@triton.jit
def coefficients(group, scalars, T: tl.constexpr):
    """The row of a group for this step."""
    first = _factor(scalars, group, 0)
    second = _factor(scalars, group, 1)
    third = _factor(scalars, group, 2)
    return Coefficients(
        (tl.load(group + COLUMN.value.h1) * first).to(T),
        (tl.load(group + COLUMN.value.h2) * second).to(T),
        (tl.load(group + COLUMN.value.h3) * third).to(T),
        (tl.load(group + COLUMN.value.d1) * first).to(T),
        (tl.load(group + COLUMN.value.d2) * second).to(T),
        (tl.load(group + COLUMN.value.d3) * third).to(T),
    )


@triton.jit
def weighted(coefficient, g, total):
    """fma(c, g, total); a coefficient of 0 takes the gradient out: 0 * inf must not poison."""
    return tl.where(coefficient != 0, tl.fma(coefficient, g, total), total)


# ---- the base rules -----------------------------------------------------------------------------


class SgdScalars(NamedTuple):
    """What SGD needs besides h, of type T."""

    lr: Any
    l2: Any


class MomentumScalars(NamedTuple):
    """What SGD with momentum needs besides h, of type T."""

    lr: Any
    l2: Any
    momentum: Any
    damped: Any  # 1 - dampening, 1 in the first step
    nesterov: Any


class AdamScalars(NamedTuple):
    """What Adam and AMSGrad need besides h, of type T."""

    lr: Any
    l2: Any
    keep: Any  # 1 - lr * decay
    beta2: Any
    rest1: Any  # 1 - beta1
    rest2: Any  # 1 - beta2
    step_size: Any  # lr / (1 - beta1^t)
    root_scale: Any  # 1 / sqrt(1 - beta2^t)
    eps: Any


@triton.jit
def power(x, t):
    """x^t for a whole t >= 0 by squaring, in the order of ``csrc/math.h``."""
    result = tl.full((), 1.0, tl.float64)
    rest = t.to(tl.int32)
    while rest > 0:
        result = tl.where(rest % 2 == 1, result * x, result)
        x = x * x
        rest = rest // 2
    return result


@triton.jit
def rule_scalars(group, t, T: tl.constexpr, RULE: tl.constexpr):
    """The scalars of a group for parameters that are updated for the t-th time (float64)."""
    lr = tl.load(group + COLUMN.value.lr)
    l2 = tl.load(group + COLUMN.value.l2).to(T)
    beta1 = tl.load(group + COLUMN.value.beta1)
    beta2 = tl.load(group + COLUMN.value.beta2)
    if RULE == RULES.value.MOMENTUM:
        damped = tl.where(t > 1, 1.0 - beta2, 1.0).to(T)
        nesterov = tl.load(group + COLUMN.value.nesterov).to(T)
        scalars = MomentumScalars(lr.to(T), l2, beta1.to(T), damped, nesterov)
    elif RULE == RULES.value.ADAM or RULE == RULES.value.AMSGRAD:
        scalars = AdamScalars(
            lr.to(T),
            l2,
            (1.0 - lr * tl.load(group + COLUMN.value.decay)).to(T),
            beta2.to(T),
            (1.0 - beta1).to(T),
            (1.0 - beta2).to(T),
            (lr / (1.0 - power(beta1, t))).to(T),
            (1.0 / tl.sqrt(1.0 - power(beta2, t))).to(T),
            tl.load(group + COLUMN.value.eps).to(T),
        )
    else:
        scalars = SgdScalars(lr.to(T), l2)
    return scalars


@triton.jit
def sgd_step(w, u, s):
    """W - lr u."""
    return tl.fma(-s.lr, u, w)


@triton.jit
def momentum_step(w, u, velocity, s):
    """The new w and velocity of SGD with momentum, dampening and Nesterov."""
    velocity = tl.fma(s.momentum, velocity, s.damped * u)
    direction = tl.where(s.nesterov != 0, tl.fma(s.momentum, velocity, u), velocity)
    return tl.fma(-s.lr, direction, w), velocity


@triton.jit
def adam_averages(u, average, square, s):
    """The new exponential averages of u and u^2."""
    average = tl.fma(s.rest1, u - average, average)
    square = tl.fma(s.rest2 * u, u, s.beta2 * square)
    return average, square


@triton.jit
def adam_step(w, average, square, s, T: tl.constexpr):
    """W after a step along the average; the weight decay of AdamW is in ``s.keep``."""
    root = tl.fma(square_root(square, T), s.root_scale, s.eps)
    return w * s.keep - s.step_size * divided(average, root, T)
