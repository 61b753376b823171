"""The reference: plain PyTorch, one tensor at a time, any device and floating dtype.

It is the oracle of the tests, so it is written to be checked against the papers by eye and not to
be fast. It computes in float64 (float32 where the device has none) and rounds once, to the dtype
of the parameter. Nothing waits for the device: conditions are tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from wsam_fused.base_rules import BaseRule
from wsam_fused.plan import Geometry, GroupRow, Slot
from wsam_fused.tensor_list import TensorList

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


def reduce(tensors: TensorList, evaluation: int, *, accumulate: bool) -> None:
    """Write the sums of squares of one gradient list to the shared scalars, or add them."""
    scalars = tensors.shared.scalars
    if not accumulate:
        slots = [Slot.METRIC_SQ, Slot.GRAD1_SQ] if evaluation == 0 else [Slot.GRAD2_SQ]
        for slot in slots:
            scalars[slot] = 0.0
    for param, grad in zip(tensors.params, tensors.grads[evaluation], strict=True):
        if grad is None:
            continue
        g = _wide(grad)
        plain_sq = (g * g).sum()
        if evaluation == 0:
            scalars[Slot.GRAD1_SQ] += plain_sq
            scalars[Slot.METRIC_SQ] += (_metric(tensors.key.geometry, param) * g * g).sum()
        else:
            scalars[Slot.GRAD2_SQ] += plain_sq


def perturb(tensors: TensorList, *, undo: bool = False) -> None:
    """Move the parameters to the ascent point, or with ``undo`` back to w."""
    finite = torch.isfinite(tensors.shared.scalars[Slot.METRIC_SQ])
    for i, (param, g1) in enumerate(zip(tensors.params, tensors.grads[0], strict=True)):
        if g1 is None:
            continue
        mark = _marks(tensors)[i]
        if undo:
            _write([(param, _restored(tensors, i)), (mark, torch.zeros_like(mark))])
            continue
        scale = _ascent_scale(tensors, i)
        moved = _wide(param) + scale * _metric(tensors.key.geometry, param) * _wide(g1)
        w = param.clone()
        writes = [(param, torch.where(finite, moved.to(param.dtype), w))]
        if tensors.backups is not None:
            writes.append((tensors.backups.tensors()[i], w))
        _write([*writes, (mark, finite.to(mark.dtype))])


def update(
    tensors: TensorList,
    rule: BaseRule,
    evaluations: int,
    *,
    check_second: bool,
    count_skipped: bool,
) -> None:
    """Restore w, step the base rule and subtract the decoupled term."""
    scalars = tensors.shared.scalars
    finite = torch.isfinite(scalars[Slot.METRIC_SQ]) & torch.isfinite(scalars[Slot.GRAD1_SQ])
    if check_second and evaluations > 1:
        finite = finite & torch.isfinite(scalars[Slot.GRAD2_SQ])
    for i, param in enumerate(tensors.params):
        if tensors.grads[0][i] is None:
            continue
        w = _restored(tensors, i)
        mark = _marks(tensors)[i]
        writes = [(mark, torch.zeros_like(mark))]
        if not tensors.has_all(i, evaluations):
            _write([(param, w), *writes])
            continue
        row = tensors.shared.rows[tensors.groups[i]]
        grads = [_wide(g[i]) for g in tensors.grads if g and g[i] is not None]  # type: ignore[arg-type]
        clip = [_clip_factor(scalars[slot], row) for slot in (Slot.GRAD1_SQ, Slot.GRAD2_SQ)]
        lr = tensors.shared.learning_rate(tensors.groups[i])
        h = row.sign * _weighted(row.h, clip, grads)
        d = row.sign * _weighted(row.d, clip, grads)
        states = [state[i] for state in tensors.states]
        if rule == BaseRule.NONE:
            targets = [tensors.grads[0][i], tensors.grads[1][i]]
            new_w, new = _wide(w), [h, d]
        else:
            targets = [*states, tensors.steps[i]]
            t = _wide(tensors.steps[i]) + 1
            new_w, new = _base_step(rule, row, lr, _wide(w), h, [_wide(s) for s in states], t)
            new_w, new = new_w - lr * d, [*new, t]
        writes.append((param, torch.where(finite, new_w.to(param.dtype), w)))
        for target, value in zip(targets, new, strict=True):
            assert target is not None  # has_all() above
            writes.append((target, torch.where(finite, value.to(target.dtype), target)))
        _write(writes)
    if count_skipped:
        scalars[Slot.SKIPPED] += 1.0 - finite.to(scalars.dtype)


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


def _restored(tensors: TensorList, i: int) -> Tensor:
    """W of parameter i, whether it is perturbed or not."""
    param, g1 = tensors.params[i], tensors.grads[0][i]
    perturbed = _marks(tensors)[i] > 0
    if tensors.backups is not None:
        return torch.where(perturbed, tensors.backups.tensors()[i], param)
    assert g1 is not None  # only perturbed parameters are restored
    w = _wide(param) - _ascent_scale(tensors, i) * _wide(g1)
    return torch.where(perturbed, w.to(param.dtype), param)


def _ascent_scale(tensors: TensorList, i: int) -> Tensor:
    """Rho / (norm + eps), 0 where the norm is 0, rounded to the precision of the parameter."""
    row = tensors.shared.rows[tensors.groups[i]]
    norm = tensors.shared.scalars[Slot.METRIC_SQ].sqrt()
    scale = torch.where(norm > 0, row.rho / (norm + row.ascent_eps), 0.0)
    dtype = torch.promote_types(tensors.params[i].dtype, torch.float32)
    scale = scale.clamp(max=torch.finfo(dtype).max)
    return _wide((row.sign * scale).to(dtype))


def _metric(geometry: Geometry, w: Tensor) -> Tensor | float:
    """The diagonal M of e = rho M g / sqrt(sum of M g^2)."""
    return _wide(w) ** 2 if geometry == Geometry.ADAPTIVE else 1.0


def _clip_factor(sum_sq: Tensor, row: GroupRow) -> Tensor | float:
    """min(1, max_norm / (norm + 1e-6)), as ``torch.nn.utils.clip_grad_norm_``."""
    if row.max_norm < 0:
        return 1.0
    return (row.max_norm / (sum_sq.sqrt() + 1e-6)).clamp(max=1.0)


def _weighted(
    coefficients: tuple[float, float, float], clip: list[Tensor | float], grads: list[Tensor]
) -> Tensor:
    """Sum of c_k clip_k g_k; a coefficient of 0 takes the gradient out, even a non-finite one."""
    total = torch.zeros_like(grads[0])
    for c, factor, g in zip(coefficients, [*clip, 1.0], grads, strict=False):
        if c != 0:
            total = total + c * factor * g
    return total


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.float32 if x.device.type == "mps" else torch.float64)


def _marks(tensors: TensorList) -> Tensor:
    """Which parameters are perturbed, one by one: this loop can be interrupted between two."""
    if tensors.flags.numel() != len(tensors.params):
        tensors.flags = tensors.flags.new_zeros(len(tensors.params))
    return tensors.flags


def _write(pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Copy all pairs in one call, which a signal cannot interrupt half-way."""
    torch._foreach_copy_([target for target, _ in pairs], [value for _, value in pairs])
