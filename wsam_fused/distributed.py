"""Parameters that are DTensors: their local memory, and over which ranks they are sharded.

The kernels see a rank's own part of every parameter. What the optimizer shows to others - state,
gradients for a foreign base optimizer - are DTensors with the parameter's mesh and placements, so
that ``torch.distributed.checkpoint`` can save and reshard them. Nothing here imports
``torch.distributed.tensor``: where nobody has, there are no DTensors.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

_MODULE = "torch.distributed.tensor"


class Sharding(NamedTuple):
    """Over which ranks the parts of a parameter lie.

    Attributes:
        groups: Names of the process groups, one for each mesh dimension that splits it; none if
            every rank has all of it.
    """

    groups: tuple[str, ...]


def is_dtensor(tensor: object) -> bool:
    """Whether a tensor is a DTensor."""
    module = sys.modules.get(_MODULE)
    dtensor = None if module is None else getattr(module, "DTensor", None)
    return dtensor is not None and isinstance(tensor, dtensor)


def local_of(tensor: Tensor) -> Tensor:
    """Return a rank's own part of a DTensor, in its memory; a plain tensor as it is.

    ``to_local()`` of a parameter gives another view every time it is asked; this is always the same
    tensor until somebody exchanges the memory.
    """
    return tensor._local_tensor if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]


def like(owner: Tensor, local: Tensor | None) -> Tensor | None:
    """Return ``local`` as a rank's part of a tensor that is distributed as ``owner`` is."""
    if local is None or not is_dtensor(owner):
        return local
    pattern: DTensor = owner  # type: ignore[assignment]
    return sys.modules[_MODULE].DTensor.from_local(  # type: ignore[no-any-return]
        local.detach(),
        pattern.device_mesh,
        pattern.placements,
        run_check=False,
        shape=pattern.shape,
        stride=pattern.stride(),
    )


def distributed_like(owner: Tensor, value: Tensor) -> Tensor:
    """Return the part of ``value`` that a rank has of it where it is distributed as ``owner`` is.

    Args:
        owner: A parameter.
        value: Of the same shape. A DTensor with other placements or another mesh is redistributed,
            which all ranks have to take part in; a plain tensor is the same on all of them.

    Returns:
        A plain tensor; ``value`` itself, if ``owner`` is none.
    """
    if not is_dtensor(owner):
        return value
    pattern: DTensor = owner  # type: ignore[assignment]
    if not is_dtensor(value):
        from torch.distributed.tensor import distribute_tensor

        value = value.to(pattern.device)
        # Every rank has all of it: nothing has to be sent.
        shared = distribute_tensor(
            value, pattern.device_mesh, pattern.placements, src_data_rank=None
        )
        return shared.to_local()
    found: DTensor = value  # type: ignore[assignment]
    if found.placements != pattern.placements or found.device_mesh != pattern.device_mesh:
        found = found.redistribute(pattern.device_mesh, pattern.placements)
    with torch.no_grad():
        return found.to_local()


# ---- which ranks ---------------------------------------------------------------------------------


def sharded_dimensions(param: Tensor) -> list[int]:
    """Return the mesh dimensions over which a parameter is split; none for a plain tensor."""
    placements: Sequence[Any] = getattr(param, "placements", ()) if is_dtensor(param) else ()
    return [i for i, placement in enumerate(placements) if not placement.is_replicate()]


def sharding_of(param: Tensor) -> Sharding | None:
    """Say over which ranks a parameter lies; None for a plain tensor."""
    if not is_dtensor(param):
        return None
    mesh = param.device_mesh  # type: ignore[attr-defined]
    return Sharding(tuple(mesh.get_group(i).group_name for i in sharded_dimensions(param)))


def shard_index(param: Tensor) -> int:
    """Return which of its parts a rank has, 0 for the first; replicas have the same.

    Over the mesh dimensions that split it, the last one counting fastest.
    """
    index = 0
    for dimension in sharded_dimensions(param):
        mesh = param.device_mesh  # type: ignore[attr-defined]
        index = index * mesh.size(dimension) + mesh.get_local_rank(dimension)
    return index


# ---- checks --------------------------------------------------------------------------------------


def check_distributed(groups: Sequence[Mapping[str, Any]]) -> None:
    """Validate how the parameters of an optimizer are distributed.

    Raises:
        ValueError: Some are DTensors and others are not, or they are on different ranks.
        TypeError: A parameter is a sum that has not been formed (a ``Partial`` placement), or a
            part of one that does not say so (FSDP1), or its parts are no plain tensors.
    """
    if sys.modules.get(_MODULE) is None:
        return
    named = [
        (_name(group, position, number), param)
        for number, group in enumerate(groups)
        for position, param in enumerate(group["params"])
    ]
    for name, param in named:
        if getattr(param, "_fsdp_flattened", False):
            raise TypeError(
                f"params has a parameter of FullyShardedDataParallel (FSDP1): {name}; expected "
                "DTensors, as torch.distributed.fsdp.fully_shard (FSDP2) makes them. FSDP1's do "
                "not say which part a rank has, and norms would be those of the part"
            )
    sharded = [(name, param) for name, param in named if is_dtensor(param)]
    if not sharded:
        return
    _check_all_dtensors(named, len(sharded))
    first_name, first = sharded[0]
    homes = {param.device_mesh: _home(param) for _, param in sharded}
    expected = homes[first.device_mesh]
    for name, param in sharded:
        kind = type(local_of(param))
        if kind not in (Tensor, torch.nn.Parameter):
            raise TypeError(
                f"params has a DTensor of {kind.__name__}: {name}; expected plain tensors as its "
                "parts, whose memory is their values"
            )
        if any(placement.is_partial() for placement in param.placements):
            raise TypeError(
                f"params has a DTensor with the placements {param.placements}: {name}; expected "
                "Shard or Replicate on every mesh dimension"
            )
        if homes[param.device_mesh] != expected:
            raise ValueError(
                f"params has DTensors of different meshes: {first_name} is on {first.device_mesh}, "
                f"{name} on {param.device_mesh}; expected meshes over the same ranks and type of "
                "device, such as slices of one mesh, so that norms can be summed over all "
                "ranks. Step the others with an optimizer of their own"
            )


def _check_all_dtensors(named: Sequence[tuple[str, Tensor]], sharded: int) -> None:
    plain = [name for name, param in named if not is_dtensor(param)]
    if not plain:
        return
    shown = ", ".join(plain[:3]) + (", ..." if len(plain) > 3 else "")
    raise ValueError(
        f"params has {sharded} DTensors and {len(plain)} plain tensors ({shown}); expected one "
        "kind, since nobody knows on which ranks a plain tensor is the same. Make them replicated "
        "DTensors with torch.distributed.tensor.distribute_tensor(param, mesh, [Replicate()]), "
        "let fully_shard have them, or step them with an optimizer of their own"
    )


def _name(group: Mapping[str, Any], position: int, number: int) -> str:
    names = group.get("param_names")
    if names is not None:
        return repr(names[position])
    shape = tuple(group["params"][position].shape)
    return f"parameter {position} of group {number}, of shape {shape}"


def _home(param: Any) -> tuple[str, tuple[int, ...]]:
    """Device type and ranks of the mesh that a parameter's mesh is a slice of."""
    mesh = param.device_mesh
    root_of = getattr(mesh, "_get_root_mesh", None)
    root = mesh if root_of is None else root_of()
    return mesh.device_type, tuple(sorted(root.mesh.flatten().tolist()))
