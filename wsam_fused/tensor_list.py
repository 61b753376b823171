"""A list of parameters that one backend steps together, with everything that belongs to it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from wsam_fused.backups import Backups
from wsam_fused.base_rules import BaseRule
from wsam_fused.gradients import GradientReader
from wsam_fused.kept_memory import keeps_scratch
from wsam_fused.plan import FLAGS, Geometry, PointerTable
from wsam_fused.shared_scalars import SharedScalars

# Parameters of these have float32 states, and w of them is restored from a copy: recomputing it
# would round to the few bits they have.
LOW_PRECISION = (torch.bfloat16, torch.float16)


class ListKey(NamedTuple):
    """Parameters with equal keys are stepped together."""

    device: torch.device
    dtype: torch.dtype
    backend: str
    rule: BaseRule
    geometry: Geometry
    has_backup: bool
    bucket: int = 0  # of lists that are updated one by one within a backward, else 0


@dataclass
class TensorList:
    """Parameters with one key, and their gradients, states and backups in the same order.

    Attributes:
        key: What they have in common.
        params: The parameters.
        groups: Parameter group of each.
        keys: Which parameter of the optimizer each is.
        shared: The scalars of their device.
        states: A list of tensors per state key of the base rule, float32 or wider.
        steps: float32 ``[n]``, updates each parameter has had.
        grad_dtypes: Dtypes of gradients, besides the parameters' own, that the backend reads.
        flags: float64; the first says at which point the list is.
        grads: g1, g2, g3, all of ``grad_dtype``; an empty list where not evaluated, None for a
            missing gradient.
        grad_dtype: Dtype of the gradients of the step in progress.
        addresses: int64 ``[n]`` on the host for each evaluation read: where its gradients are, 0
            for a missing one.
        backups: Copies of w while the list is at another point, None otherwise.
        table: The addresses of all these, if the backend's kernels need them.
        awaited: Parameters whose last gradient the update within a backward waits for; None if it
            has not begun to wait.
        updated: Whether the update within the backward of this step has been made.
    """

    key: ListKey
    params: list[Tensor]
    groups: list[int]
    keys: list[int]
    shared: SharedScalars
    states: list[list[Tensor]]
    steps: Tensor
    grad_dtypes: tuple[torch.dtype, ...] = ()
    flags: Tensor = field(init=False)
    grads: list[list[Tensor | None]] = field(init=False)
    grad_dtype: torch.dtype = field(init=False)
    addresses: list[Tensor] = field(init=False, default_factory=list)
    backups: Backups | None = None
    table: PointerTable | None = None
    awaited: set[Tensor] | None = None
    updated: bool = False
    _block: Tensor | None = None  # of the backups

    def __post_init__(self) -> None:
        self.reader = GradientReader(self.params, self.grad_dtypes)
        self.grads = [[], [], []]
        self.grad_dtype = self.key.dtype
        self.flags = torch.zeros(FLAGS, dtype=torch.float64, device=self.key.device)

    def make_backups(self, reuse_first_gradient: bool) -> None:
        """Provide memory for copies of w.

        Args:
            reuse_first_gradient: The method does not need g1 after the perturbation, so that the
                copy may take its memory.
        """
        if reuse_first_gradient and self.grad_dtype == self.key.dtype:
            pairs = zip(self.params, self.grads[0], strict=True)
            self.backups = Backups.of(torch.empty_like(p) if g is None else g for p, g in pairs)
        elif self.table is None:
            self.backups = Backups.of(map(torch.empty_like, self.params))
        else:
            block = self._block
            if block is None:
                device, dtype = self.key.device, self.key.dtype
                block = torch.empty(self.table.total, dtype=dtype, device=device)
            if keeps_scratch(self.key.device) and not self.key.bucket:
                self._block = block
            self.backups = Backups.in_block(block, self.reader.noted_layouts, self.table)

    def release(self) -> None:
        """Drop what lives only inside a step."""
        self.grads = [[], [], []]
        self.addresses = []
        self.backups = None
        self.awaited = None
        self.updated = False

    def has_gradients(self, index: int, required: int) -> bool:
        """Whether parameter ``index`` has gradient k + 1 for every bit k of ``required``."""
        return all(self.grads[k][index] is not None for k in range(3) if required >> k & 1)


def state_dtype(param: Tensor) -> torch.dtype:
    """Dtype of the states of ``param``: its own, but at least float32."""
    return torch.float32 if param.dtype in LOW_PRECISION else param.dtype


def state_tensor(param: Tensor, loaded: object, name: str) -> Tensor:
    """Return the state tensor of ``param``: what was loaded, in the parameter's layout, or zeros.

    Raises:
        ValueError: The loaded tensor has another shape.
    """
    dtype = state_dtype(param)
    if loaded is None:
        return torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)
    if not isinstance(loaded, Tensor) or loaded.shape != param.shape:
        found = tuple(loaded.shape) if isinstance(loaded, Tensor) else type(loaded).__name__
        raise ValueError(
            f"state {name!r} is {found}, expected a tensor of shape {tuple(param.shape)}"
        )
    return laid_out_like(param, loaded, dtype)


def laid_out_like(param: Tensor, values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``values`` on the device and with the strides of ``param``, a copy if need be."""
    same = values.stride() == param.stride() and values.dtype == dtype
    if same and values.device == param.device:
        return values
    empty = torch.empty_like(param, dtype=dtype, memory_format=torch.preserve_format)
    return empty.copy_(values)
