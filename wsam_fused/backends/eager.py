"""The reference: plain PyTorch, one tensor at a time, any device and floating dtype.

It is the oracle of the tests, so it is written to be checked against the papers by eye and not to
be fast. It computes in float64 (float32 where the device has none) and rounds once, to the dtype
of the parameter. Nothing waits for the device: conditions are tensors.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from wsam_fused.base_rules import BaseRule
from wsam_fused.coefficients import clip_factor
from wsam_fused.plan import Geometry, GroupRow, Point, Slot
from wsam_fused.tensor_list import TensorList
from wsam_fused.uninterrupted import Change

DEVICE_TYPES: tuple[str, ...] = ()
DTYPES: tuple[torch.dtype, ...] = ()
GRADIENT_DTYPES: dict[torch.dtype, tuple[torch.dtype, ...]] = {}


def unavailable() -> str | None:
    """Never: this backend needs nothing."""
    return None


def device_problem(device: torch.device) -> str | None:
    """None: any device will do."""
    return None


def bind(tensors: TensorList, evaluation: int, addresses: Tensor) -> None:
    """Nothing to prepare: the gradients are read from the list itself."""


def refresh(tensors: TensorList) -> None:
    """Nothing to prepare."""


def reduce(tensors: TensorList, evaluation: int, *, with_first: bool, accumulate: bool) -> None:
    """Write the sums over one gradient list to the shared scalars, or add them."""
    scalars = tensors.shared.scalars
    plain = Slot.GRAD1_SQ + evaluation
    slots = [Slot.METRIC_SQ] if evaluation == 0 else [Slot.DOT12] if with_first else []
    if not accumulate:
        for slot in [*slots, plain]:
            scalars[slot] = 0.0
    for i, (g1, grad) in enumerate(zip(tensors.grads[0], tensors.grads[evaluation], strict=True)):
        if grad is None or (with_first and g1 is None):
            continue
        g = _wide(grad)
        scalars[plain] += (g * g).sum()
        if evaluation == 0:
            scalars[Slot.METRIC_SQ] += (_metric(tensors, i, g) * g * g).sum()
        elif with_first:
            scalars[Slot.DOT12] += (_wide(g1) * g).sum()  # type: ignore[arg-type]


def perturb(tensors: TensorList, target: Point) -> None:
    """Move the parameters from where they are to another point."""
    by_gradient = target in (Point.ASCENT, Point.DESCENT)
    norm = tensors.shared.scalars[Slot.METRIC_SQ]
    for i, (param, g1) in enumerate(zip(tensors.params, _first_gradients(tensors), strict=True)):
        at = _at(tensors)[i]
        if by_gradient and g1 is None:
            continue
        w = _weights(tensors, i)
        if target == Point.WEIGHTS:
            _write([(param, w.to(param.dtype)), (at, torch.zeros_like(at))])
            continue
        if target == Point.PROBE:
            moved = _wide(w) + tensors.shared.value(tensors.groups[i], "delta") * _noise(tensors, i)
            can_move = torch.ones_like(norm, dtype=torch.bool)
        else:
            assert g1 is not None
            direction = _metric(tensors, i, _wide(g1), w) * _wide(g1)
            moved = _wide(w) + _scale(tensors, i, target) * direction
            can_move = torch.isfinite(norm)
        writes = [(param, torch.where(can_move, moved.to(param.dtype), param))]
        if tensors.backups is not None and tensors.masters is None:
            writes.append((tensors.backups.tensors()[i], w))
        _write([*writes, (at, torch.where(can_move, float(target), at))])


def updating(
    tensors: TensorList,
    rule: BaseRule,
    evaluations: int,
    *,
    required: int,
    checked: int,
    keep_point: bool,
    count_skipped: bool,
) -> Change:
    """Restore w, step the base rule and subtract the decoupled term.

    Returns:
        The one call that writes all new values, which have been formed.
    """
    scalars = tensors.shared.scalars
    finite = _all_finite(scalars, checked)
    writes: list[tuple[Tensor, Tensor]] = []
    for i, param in enumerate(tensors.params):
        at = _at(tensors)[i]
        w = _weights(tensors, i)
        writes.append((at, torch.zeros_like(at)))
        if not tensors.has_gradients(i, required):
            writes.append((param, w.to(param.dtype)))
            continue
        group = tensors.groups[i]
        row = tensors.shared.rows[group]
        grads = [None if g[i] is None else _wide(g[i]) for g in tensors.grads[:evaluations]]  # type: ignore[arg-type]
        h = row.sign * _weighted(tensors, i, "h", grads)
        d = row.sign * _weighted(tensors, i, "d", grads)
        start = _wide(param) if keep_point else _wide(w)
        states = [state[i] for state in tensors.states]
        if rule == BaseRule.NONE:
            found = [g[i] for g in tensors.grads[:2] if g and g[i] is not None]
            new_w, targets, new = start, found, [h, d]
        else:
            targets = [*states, tensors.steps[i]]
            t = _wide(tensors.steps[i]) + 1
            lr = tensors.shared.value(group, "lr")
            new_w, new = _base_step(rule, row, lr, start, h, [_wide(s) for s in states], t)
            new_w, new = new_w - lr * d, [*new, t]
        if tensors.masters is not None:
            new_w = new_w.to(torch.float32)
            writes.append((tensors.masters[i], torch.where(finite, new_w, w)))
        rounds = rule != BaseRule.NONE
        pairs = [(param, w.to(param.dtype), new_w)]
        for target, value in zip(targets, new, strict=False):
            assert target is not None  # it is required
            pairs.append((target, target, value))
        for operand, (target, old, value) in enumerate(pairs):
            rounded = _rounded(tensors, i, value, target.dtype, operand if rounds else None)
            writes.append((target, torch.where(finite, rounded, old)))
    if count_skipped:
        skipped = scalars[Slot.SKIPPED]
        writes.append((skipped, skipped + 1.0 - finite.to(scalars.dtype)))
    places = [place for place, _ in writes]
    return partial(torch._foreach_copy_, places, [value for _, value in writes])


def _base_step(
    rule: BaseRule,
    row: GroupRow,
    lr: float | Tensor,
    w: Tensor,
    h: Tensor,
    states: list[Tensor],
    t: Tensor,
) -> tuple[Tensor, list[Tensor]]:
    """One step of ``torch.optim.SGD``, ``Adam`` or ``AdamW``; t counts from 1."""
    u = h + row.l2 * w
    if rule == BaseRule.SGD:
        return w - lr * u, []
    if rule == BaseRule.MOMENTUM:
        momentum, dampening = row.beta1, row.beta2
        first = (t == 1).to(u.dtype)  # the first step is not dampened
        v = momentum * states[0] + (1 - dampening + dampening * first) * u
        return w - lr * (u + momentum * v if row.nesterov else v), [v]
    w = w * (1 - lr * row.decay)
    m = row.beta1 * states[0] + (1 - row.beta1) * u
    v = row.beta2 * states[1] + (1 - row.beta2) * u * u
    new = [m, v]
    if rule == BaseRule.AMSGRAD:
        new.append(torch.maximum(states[2], v))
    m_hat = m / (1 - row.beta1**t)
    v_hat = new[-1] / (1 - row.beta2**t)
    return w - lr * m_hat / (v_hat.sqrt() + row.eps), new


# ---- the points ----------------------------------------------------------------------------------


def _weights(tensors: TensorList, i: int) -> Tensor:
    """W of parameter i, wherever it is; in float32 if it is kept so."""
    param, at = tensors.params[i], _at(tensors)[i]
    if tensors.masters is not None:
        return tensors.masters[i]
    if tensors.backups is not None:
        return torch.where(at > 0, tensors.backups.tensors()[i], param)
    g1 = _first_gradients(tensors)[i]
    if g1 is None:
        return param.clone()
    scale = torch.where(
        at == Point.ASCENT, _scale(tensors, i, Point.ASCENT), _scale(tensors, i, Point.DESCENT)
    )
    w = _wide(param) - scale * _wide(g1)
    return torch.where(at > 0, w.to(param.dtype), param)


def _scale(tensors: TensorList, i: int, point: Point) -> Tensor:
    """Radius / (norm + eps), 0 where the norm is 0, rounded to the precision of the parameter."""
    row = tensors.shared.rows[tensors.groups[i]]
    radius = row.rho if point == Point.ASCENT else row.rho_descent
    inverse = tensors.shared.scalars[Slot.INV_SCALE1]
    norm = tensors.shared.scalars[Slot.METRIC_SQ].sqrt() * inverse
    # Of the gradient in memory, which is the gradient times a loss scale.
    scale = torch.where(norm > 0, radius / (norm + row.ascent_eps) * inverse, 0.0)
    dtype = torch.promote_types(tensors.params[i].dtype, torch.float32)
    scale = scale.clamp(max=torch.finfo(dtype).max)
    side = 1.0 if point == Point.ASCENT else -1.0
    return _wide((side * row.sign * scale).to(dtype))


def _metric(tensors: TensorList, i: int, g: Tensor, w: Tensor | None = None) -> Tensor | float:
    """The diagonal M of e = rho M g / sqrt(sum of M g^2) at w; g is what is in memory."""
    eta = tensors.shared.rows[tensors.groups[i]].eta
    if tensors.key.geometry == Geometry.ADAPTIVE:
        return (_wide(_weights(tensors, i) if w is None else w).abs() + eta) ** 2
    true_g = g * tensors.shared.scalars[Slot.INV_SCALE1]
    return 1 / (1 + eta * true_g**2) if tensors.key.geometry == Geometry.FISHER else 1.0


def _first_gradients(tensors: TensorList) -> list[Tensor | None]:
    """g1 of every parameter, also before there are gradients."""
    return tensors.grads[0] or [None] * len(tensors.params)


def _at(tensors: TensorList) -> Tensor:
    """Where each parameter is, one by one: these loops can be interrupted between two."""
    if tensors.flags.numel() != len(tensors.params):
        tensors.flags = tensors.flags.new_zeros(len(tensors.params))
    return tensors.flags


# ---- noise ---------------------------------------------------------------------------------------


def _noise(tensors: TensorList, i: int) -> Tensor:
    """Noise of -1 and 1 for parameter i, element by element in the order of its memory."""
    index = torch.arange(tensors.params[i].numel(), device=tensors.key.device)
    seed = tensors.shared.scalars[Slot.SEED].to(torch.int64)
    word = _hashed(_noise_of(seed, tensors.keys[i]) + (index >> 5) * 0x9E3779B9)
    return _wide(_placed(tensors.params[i], ((word >> (index & 31)) & 1) * 2 - 1))


def _noise_of(seed: Tensor, key: int) -> Tensor:
    """What the noise of a tensor begins with."""
    return _hashed(_hashed(_hashed(seed & _ONES) + (seed >> 32)) + key)


def _placed(param: Tensor, values: Tensor) -> Tensor:
    """Give values in the order of a parameter's memory its shape."""
    placed = torch.empty_like(param, dtype=torch.int64, memory_format=torch.preserve_format)
    order = sorted(range(param.dim()), key=placed.stride, reverse=True)
    inner = values.view([param.shape[k] for k in order])
    return inner.permute([order.index(k) for k in range(param.dim())])


_ONES = 0xFFFFFFFF


def _hashed(x: Tensor) -> Tensor:
    """The hash of ``csrc/math.h``: 32 bits, held in int64."""
    x = x & _ONES
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _ONES
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _ONES
    return x ^ (x >> 16)


# ---- rounding ------------------------------------------------------------------------------------


def _rounded(
    tensors: TensorList, i: int, value: Tensor, dtype: torch.dtype, operand: int | None
) -> Tensor:
    """Round to nearest, or to bfloat16 by chance: up with the probability that the value asks for.

    ``operand`` is 0 for the parameter, 1 to 3 for its states.
    """
    if tensors.rounding_seed < 0 or dtype != torch.bfloat16 or operand is None:
        return value.to(dtype)
    value = value.to(torch.float32)
    param = tensors.params[i]
    seed = torch.tensor(tensors.rounding_seed, device=param.device)
    of_tensor = _hashed(_noise_of(seed, tensors.keys[i]) + tensors.steps[i].to(torch.int64))
    index = torch.arange(param.numel(), device=param.device)
    chance = _hashed(of_tensor + operand * 0x85EBCA6B + index * 0x9E3779B9) >> 16
    bits = value.view(torch.int32).to(torch.int64) & _ONES
    bits = (bits + _placed(param, chance)) & 0xFFFF0000
    bits = torch.where(bits > 0x7FFFFFFF, bits - (1 << 32), bits)
    rounded = bits.to(torch.int32).view(torch.float32)
    return torch.where(torch.isfinite(value), rounded, value).to(dtype)


# ---- coefficients --------------------------------------------------------------------------------


def _all_finite(scalars: Tensor, checked: int) -> Tensor:
    slots: list[int] = [Slot.GRAD1_SQ + k for k in range(3) if checked >> k & 1]
    finite = scalars[Slot.FOUND_INF] == 0
    for slot in [*slots, Slot.METRIC_SQ] if checked & 1 else slots:
        finite = finite & torch.isfinite(scalars[slot])
    return finite


def _weighted(tensors: TensorList, i: int, name: str, grads: list[Tensor | None]) -> Tensor:
    """Sum of c_k clip_k g_k; a coefficient of 0 takes the gradient out, even a non-finite one."""
    total = _wide(torch.zeros_like(tensors.params[i]))
    for k, g in enumerate(grads):
        c = tensors.shared.value(tensors.groups[i], f"{name}{k + 1}")
        if g is None or (not isinstance(c, Tensor) and c == 0):
            continue
        inverse = tensors.shared.scalars[Slot.INV_SCALE1 + k]
        term = c * _clip_factor(tensors, i, k) * inverse * g
        total = total + (torch.where(c != 0, term, 0.0) if isinstance(c, Tensor) else term)
    return total


def _clip_factor(tensors: TensorList, i: int, evaluation: int) -> Tensor | float:
    max_norm = tensors.shared.rows[tensors.groups[i]].max_norm
    if max_norm < 0:
        return 1.0
    scalars = tensors.shared.scalars
    norm = scalars[Slot.GRAD1_SQ + evaluation].sqrt() * scalars[Slot.INV_SCALE1 + evaluation]
    return clip_factor(max_norm, norm)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.float32 if x.device.type == "mps" else torch.float64)


def _write(pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Copy all pairs in one call, which a signal cannot interrupt half-way."""
    torch._foreach_copy_([target for target, _ in pairs], [value for _, value in pairs])
