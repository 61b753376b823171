"""Coefficients of a step that follow from the sums over its gradients or from an earlier row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from wsam_fused.plan import INVERSE_SCALES, GroupRow, Slot
from wsam_fused.row import Row, Sums


def clip_factor(max_norm: float, norm: Tensor) -> Tensor:
    """Return min(1, max_norm / (norm + 1e-6)), as ``torch.nn.utils.clip_grad_norm_``."""
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)


def derived(
    scalars: Tensor, rows: Sequence[GroupRow], method: Sequence[Row], *, foreign: bool
) -> list[Mapping[str, Tensor]]:
    """Return the coefficients of each group that follow from the sums of a step.

    Args:
        scalars: Of a device.
        rows: One per group.
        method: The method's rows, one per group.
        foreign: Whether h goes to an optimizer that multiplies it by the sign itself.
    """
    found: list[Mapping[str, Tensor]] = []
    inverse = scalars[INVERSE_SCALES]
    norms = scalars[Slot.GRAD1_SQ : Slot.GRAD3_SQ + 1].sqrt() * inverse
    product = scalars[Slot.DOT12] * inverse[0] * inverse[1]
    for row, of_method in zip(rows, method, strict=True):
        if of_method.derive is None:
            found.append({})
            continue
        clipped, dot = norms, product
        if row.max_norm >= 0:
            factors = clip_factor(row.max_norm, norms)
            clipped, dot = norms * factors, dot * factors[0] * factors[1]
        first, second, third = clipped.unbind()
        columns = of_method.derive(Sums(first, second, third, dot, row.ascent_eps))
        if foreign and row.sign < 0:
            columns = {name: -c if name.startswith("h") else c for name, c in columns.items()}
        found.append(columns)
    return found


def with_the_perturbation_of(before: list[GroupRow], rows: list[GroupRow]) -> list[GroupRow]:
    """Return ``rows`` with the radii that the weights were perturbed with: the restore needs them.

    Raises:
        RuntimeError: ``maximize`` was changed meanwhile.
    """
    if [row.sign for row in rows] != [row.sign for row in before]:
        raise RuntimeError("maximize was changed while the weights are perturbed")
    return [
        row._replace(rho=old.rho, rho_descent=old.rho_descent)
        for row, old in zip(rows, before, strict=True)
    ]
