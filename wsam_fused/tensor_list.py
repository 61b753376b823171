"""A list of parameters that one backend steps together, with everything that belongs to it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from wsam_fused.backups import Backups
from wsam_fused.base_rules import BaseRule
from wsam_fused.distributed import Sharding, distributed_like, local_of
from wsam_fused.gradients import GradientReader
from wsam_fused.kept_memory import keeps_scratch
from wsam_fused.plan import FLAGS, Geometry, PointerTable
from wsam_fused.precision import follow_parameter
from wsam_fused.sharded_gradients import ShardedGradientReader
from wsam_fused.shared_scalars import SharedScalars


class ListKey(NamedTuple):
    """Parameters with equal keys are stepped together."""

    device: torch.device
    dtype: torch.dtype
    backend: str
    rule: BaseRule
    geometry: Geometry
    has_backup: bool
    state_dtype: torch.dtype
    has_master: bool
    sharding: Sharding | None = None
    bucket: int = 0  # of lists that are updated one by one within a backward, else 0


@dataclass
class TensorList:
    """Parameters with one key, and their gradients, states and backups in the same order.

    Attributes:
        key: What they have in common.
        params: The parameters; of DTensors, the local tensors.
        groups: Parameter group of each.
        keys: Which parameter of the optimizer each is.
        shared: The scalars of their device.
        states: A list of tensors per state key of the base rule.
        steps: float32 ``[n]``, updates each parameter has had.
        grad_dtypes: Dtypes of gradients, besides the parameters' own, that the backend reads.
        masters: The weights in float32, of which the parameters are a copy; or None.
        rounding_seed: Of rounding by chance; -1 for rounding to nearest.
        owners: What the optimizer and autograd know: ``params``, or the DTensors they are of.
        flags: float64; the first says at which point the list is.
        grads: g1, g2, g3, all of ``grad_dtype``; an empty list where not evaluated, None for a
            missing gradient.
        grad_dtype: Dtype of the gradients of the step in progress.
        addresses: int64 ``[n]`` on the host for each evaluation read: where its gradients are, 0
            for a missing one.
        backups: Copies of w while the list is at another point, None otherwise; the float32
            weights, always, if there are any.
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
    masters: list[Tensor] | None = None
    rounding_seed: int = -1
    owners: list[Tensor] = field(default_factory=list)
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
        self.owners = self.owners or self.params
        self.reader = (
            GradientReader(self.params, self.grad_dtypes)
            if self.key.sharding is None
            else ShardedGradientReader(self.owners, self.params, self.grad_dtypes)
        )
        self.grads = [[], [], []]
        self.grad_dtype = self.key.dtype
        self.flags = torch.zeros(FLAGS, dtype=torch.float64, device=self.key.device)
        self._versions: list[int] = []  # of the parameters: none is known
        self._follows = False  # in this step
        if self.masters is not None:
            self.backups = Backups.of(self.masters)

    def follow_parameters(self) -> None:
        """Take over into the float32 weights what others have written to the parameters."""
        if self.masters is None:
            return
        self._follows = True
        versions = [param._version for param in self.params]
        if versions != self._versions:
            for master, param in zip(self.masters, self.params, strict=True):
                follow_parameter(master, param)

    def make_backups(self, reuse_first_gradient: bool) -> None:
        """Provide memory for copies of w.

        Args:
            reuse_first_gradient: The method does not need g1 after the perturbation, so that the
                copy may take its memory.
        """
        if self.masters is not None:
            return
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
        self.drop_backups()
        self.awaited = None
        self.updated = False
        if self._follows:
            self._versions = [param._version for param in self.params]
            self._follows = False

    def drop_backups(self) -> None:
        """Let go of copies of w, which the parameters are at again."""
        if self.masters is None:
            self.backups = None

    def has_gradients(self, index: int, required: int) -> bool:
        """Whether parameter ``index`` has gradient k + 1 for every bit k of ``required``."""
        return all(self.grads[k][index] is not None for k in range(3) if required >> k & 1)


def state_tensor(
    param: Tensor, loaded: object, name: str, dtype: torch.dtype, *, initial: Tensor | None = None
) -> Tensor:
    """Return a state tensor of ``param``, in its layout.

    Args:
        param: The parameter.
        loaded: What a checkpoint says, or None.
        name: Its key.
        dtype: Of the state.
        initial: What it begins with; None for zeros.

    Of a DTensor, it is the state of its local tensor.

    Raises:
        ValueError: The loaded tensor has another shape.
    """
    local = local_of(param)
    if loaded is None:
        zeros = torch.zeros_like(local, dtype=dtype, memory_format=torch.preserve_format)
        return zeros if initial is None else zeros.copy_(initial)
    if not isinstance(loaded, Tensor) or loaded.shape != param.shape:
        found = tuple(loaded.shape) if isinstance(loaded, Tensor) else type(loaded).__name__
        raise ValueError(
            f"state {name!r} is {found}, expected a tensor of shape {tuple(param.shape)}"
        )
    return laid_out_like(local, distributed_like(param, loaded), dtype)


def laid_out_like(param: Tensor, values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``values`` on the device and with the strides of ``param``, a copy if need be."""
    same = values.stride() == param.stride() and values.dtype == dtype
    if same and values.device == param.device:
        return values
    empty = torch.empty_like(param, dtype=dtype, memory_format=torch.preserve_format)
    return empty.copy_(values)
