"""The problem of the tests of sharded parameters, and the ways to shard it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from cases import BASES, FOREIGN_BASES
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_module
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from wsam_fused import BSAM, GSAM, SAM, WSAM

STEPS = 4
ALL_BASES = {**BASES, **FOREIGN_BASES}
METHODS: dict[str, Callable[..., Any]] = {
    "sam": functools.partial(SAM, rho=0.1),
    "wsam": functools.partial(WSAM, rho=0.1, gamma=0.8),
    "gsam": functools.partial(GSAM, rho=0.1, alpha=0.4),
    "bsam": functools.partial(BSAM, rho=0.1, rho_min=0.2),
    "wsam-clip": functools.partial(WSAM, rho=0.1, max_grad_norm=0.5),
    "sam-asam": functools.partial(SAM, rho=0.5, geometry="adaptive", eta=0.05),
    "wsam-backup": functools.partial(WSAM, rho=0.1, restore="backup"),
    "wsam-every": functools.partial(WSAM, rho=0.1, every=2),
}


class Net(nn.Module):
    """Two layers of lengths that no number of ranks divides, and a normalization.

    On four ranks the last weight, of 3 rows, leaves one rank without a part.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 9)
        self.norm = nn.LayerNorm(9)
        self.last = nn.Linear(9, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(torch.tanh(self.first(x))))


def problem(dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor, Tensor]:
    """Return a model and a batch, the same in every process."""
    torch.manual_seed(0)
    return Net().to(dtype), torch.randn(16, 5).to(dtype), torch.randn(16, 3).to(dtype)


def train(
    model: nn.Module,
    optimizer: Any,
    x: Tensor,
    y: Tensor,
    *,
    steps: int = STEPS,
    parts: int = 1,
) -> None:
    """Make steps with a closure, or with one for each of several micro-batches."""

    def closure(x: Tensor, y: Tensor) -> Tensor:
        if parts == 1:
            optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        return loss

    pieces = zip(x.chunk(parts), y.chunk(parts), strict=True)
    closures = [functools.partial(closure, *piece) for piece in pieces]
    for _ in range(steps):
        optimizer.step(closures if parts > 1 else closures[0])


def own_share(whole: Tensor, ranks: int, rank: int, parts: int = 1) -> Tensor:
    """Return a rank's share of every micro-batch."""
    return torch.cat([part.chunk(ranks)[rank] for part in whole.chunk(parts)])


def full(tensor: Tensor) -> Tensor:
    """Return the whole of a tensor, which all ranks have to ask for."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def summary(model: nn.Module, optimizer: Any) -> dict[str, Tensor]:
    """Return all that a training run leaves, whole: parameters, state and the last norms."""
    found = {}
    for name, param in model.named_parameters():
        found[name] = full(param)
        for key, value in optimizer.state[param].items():
            found[f"{name}, {key}"] = full(value)
    for name in ("grad_norm", "second_grad_norm", "third_grad_norm", "cosine"):
        value = getattr(optimizer.last, name)
        if value is not None:
            found[name] = value.clone()
    return found


# ---- ways to shard -------------------------------------------------------------------------------


class Way:
    """A way to shard the model.

    Args:
        shard: Shards it in place.
        batches: Over how many ranks the batch is divided, for a number of ranks.
        index: Which share of it a rank has.
    """

    def __init__(
        self,
        shard: Callable[[nn.Module], None],
        batches: Callable[[int], int] = lambda world: world,
        index: Callable[[int], int] = lambda rank: rank,
    ) -> None:
        self.shard = shard
        self._batches = batches
        self._index = index

    def share(self, whole: Tensor, parts: int = 1) -> Tensor:
        """Return this rank's share of a batch."""
        world, rank = dist.get_world_size(), dist.get_rank()
        return own_share(whole, self._batches(world), self._index(rank), parts)


def _each_layer(model: nn.Module, mesh: Any, **options: Any) -> None:
    for layer in (model.first, model.norm):
        fully_shard(layer, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)


def _fsdp(model: nn.Module, **options: Any) -> None:
    _each_layer(model, init_device_mesh("cpu", (dist.get_world_size(),)), **options)


def _keeps_gathered(model: Any) -> None:
    _fsdp(model)
    model.set_reshard_after_backward(False)


def _hsdp(model: nn.Module) -> None:
    _each_layer(model, init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards")))


def _columns_and_rows() -> dict[str, Any]:
    return {
        "first": ColwiseParallel(output_layouts=Replicate()),
        "last": RowwiseParallel(input_layouts=Replicate()),
    }


def _tp(model: Any) -> None:
    """Tensor parallel; the norm is the same on all ranks."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tensor",))
    parallelize_module(model, mesh, _columns_and_rows())
    distribute_module(
        model.norm,
        mesh,
        input_fn=lambda _, inputs, mesh: DTensor.from_local(inputs[0], mesh, [Replicate()]),
        output_fn=lambda _, output, mesh: output.to_local(),
    )


def _tp_and_fsdp(model: Any) -> None:
    """Columns and rows over two ranks; over the other two all of it, also the norm."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    parallelize_module(model, mesh["tensor"], _columns_and_rows())
    _each_layer(model, mesh["data"])


OFFLOADED = CPUOffloadPolicy(pin_memory=False)
WAYS = {
    "fsdp": Way(_fsdp),
    "fsdp-keeps-gathered": Way(_keeps_gathered),
    "fsdp-offloaded": Way(functools.partial(_fsdp, offload_policy=OFFLOADED)),
    "hsdp": Way(_hsdp),
    "tp": Way(_tp, lambda world: 1, lambda rank: 0),
    "tp-and-fsdp": Way(_tp_and_fsdp, lambda world: 2, lambda rank: rank // 2),
}
