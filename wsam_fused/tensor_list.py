"""A list of parameters that one backend steps together, with everything that belongs to it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from wsam_fused.base_rules import BaseRule
from wsam_fused.gradients import GradientReader
from wsam_fused.plan import FLAGS, Geometry, GroupRow, PointerTable, Slot


class Settings(NamedTuple):
    """What the operations need and no step changes.

    Attributes:
        eps: Added to the norm of the perturbation.
        max_norm: Clipping threshold of each gradient's norm; negative is none.
        check_second: Whether the norm of g2 is known, so that a step with a non-finite one is
            skipped.
    """

    eps: float
    max_norm: float
    check_second: bool


class SharedScalars:
    """What all lists of one device have in common.

    Attributes:
        scalars: float64, see :class:`~wsam_fused.plan.Slot`.
        rows: One row per parameter group, on the host.
        groups: The same as a float64 tensor on the device.
    """

    def __init__(self, device: torch.device) -> None:
        self.scalars = torch.zeros(len(Slot), dtype=torch.float64, device=device)
        self.rows: list[GroupRow] = []
        self.groups = torch.zeros(0, len(GroupRow._fields), dtype=torch.float64, device=device)

    def set_rows(self, rows: list[GroupRow]) -> None:
        """Bring the group table up to date; nothing moves if nothing changed."""
        if rows == self.rows:
            return
        table = torch.tensor(rows, dtype=torch.float64)
        if len(rows) != len(self.rows):
            self.groups = table.to(self.groups.device)
        else:
            self.groups.copy_(table)
        self.rows = list(rows)


class ListKey(NamedTuple):
    """Parameters with equal keys are stepped together."""

    device: torch.device
    dtype: torch.dtype
    backend: str
    rule: BaseRule
    geometry: Geometry
    has_backup: bool


@dataclass
class TensorList:
    """Parameters with one key, and their gradients, states and backups in the same order.

    Attributes:
        key: What they have in common.
        params: The parameters.
        groups: Parameter group of each.
        shared: The scalars of their device.
        states: A list of tensors per state key of the base rule.
        steps: float32 ``[n]``, updates each parameter has had.
        flags: float64; the first says whether the list is perturbed.
        grads: g1, g2, g3; an empty list where not evaluated, None for a missing gradient.
        backups: Copies of w while perturbed, empty otherwise.
        table: The addresses of all these, if the backend's kernels need them.
    """

    key: ListKey
    params: list[Tensor]
    groups: list[int]
    shared: SharedScalars
    states: list[list[Tensor]]
    steps: Tensor
    flags: Tensor = field(init=False)
    grads: list[list[Tensor | None]] = field(init=False)
    backups: list[Tensor] = field(default_factory=list)
    table: PointerTable | None = None

    def __post_init__(self) -> None:
        self.reader = GradientReader(self.params)
        self.grads = [[], [], []]
        self.flags = torch.zeros(FLAGS, dtype=torch.float64, device=self.key.device)

    def make_backups(self, reuse_first_gradient: bool) -> None:
        """Provide memory for copies of w.

        Args:
            reuse_first_gradient: The method does not need g1 after the perturbation, so that the
                copy may take its memory.
        """
        self.backups = [
            grad if reuse_first_gradient and grad is not None else torch.empty_like(param)
            for param, grad in zip(self.params, self.grads[0], strict=True)
        ]

    def release(self) -> None:
        """Drop what lives only inside a step."""
        self.grads = [[], [], []]
        self.backups = []

    def has_all(self, index: int, evaluations: int) -> bool:
        """Whether parameter ``index`` has a gradient from every evaluation."""
        return all(self.grads[k][index] is not None for k in range(evaluations))


def state_tensor(param: Tensor, loaded: object, name: str) -> Tensor:
    """Return the state tensor of ``param``: what was loaded, in the parameter's layout, or zeros.

    Raises:
        ValueError: The loaded tensor has another shape.
    """
    if loaded is None:
        return torch.zeros_like(param, memory_format=torch.preserve_format)
    if not isinstance(loaded, Tensor) or loaded.shape != param.shape:
        found = tuple(loaded.shape) if isinstance(loaded, Tensor) else type(loaded).__name__
        raise ValueError(
            f"state {name!r} is {found}, expected a tensor of shape {tuple(param.shape)}"
        )
    same = loaded.stride() == param.stride() and loaded.dtype == param.dtype
    if same and loaded.device == param.device:
        return loaded
    return torch.empty_like(param, memory_format=torch.preserve_format).copy_(loaded)


def is_dense(param: Tensor) -> bool:
    """Whether the elements of ``param`` fill one block of memory, in whatever order."""
    expected = 1
    for stride, size in sorted(zip(param.stride(), param.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True
