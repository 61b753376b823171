"""A small model, trained by several processes or by one: the runs of the tests of replicas."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from wsam_fused import BSAM, GNP, GSAM, SAM, WSAM

RANKS = 2
STEPS = 4
METHODS: dict[str, Callable[..., Any]] = {
    "sam": SAM,
    "wsam": functools.partial(WSAM, gamma=0.8),
    "coupled": functools.partial(WSAM, gamma=0.8, decouple=False),
    "gnp": functools.partial(GNP, alpha=0.6),
    "gsam": functools.partial(GSAM, alpha=0.4),
    "gsam-0": functools.partial(GSAM, alpha=0.0),
    "bsam": functools.partial(BSAM, rho_min=0.2),
}
BASES: dict[str, Callable[..., Any]] = {
    "sgdm": functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=0.01),
    "adamw": functools.partial(torch.optim.AdamW, lr=0.01),
    "rmsprop": functools.partial(torch.optim.RMSprop, lr=0.01),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"rho": 0.3},
    "adaptive": {"rho": 0.5, "adaptive": True},
    "clip": {"rho": 0.3, "max_grad_norm": 0.4},
    "every": {"rho": 0.3, "every": 2},
}


class Net(nn.Module):
    """Two linear layers, and a third that only some inputs, and one that none reaches."""

    def __init__(self, *, optional: bool = False) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 2))
        self.optional = nn.Linear(5, 2) if optional else None
        self.unused = nn.Linear(2, 2) if optional else None

    def forward(self, x: Tensor, use_optional: bool = True) -> Tensor:
        out: Tensor = self.body(x)
        return out if self.optional is None or not use_optional else out + self.optional(x)


def problem(
    dtype: torch.dtype = torch.float64, *, optional: bool = False
) -> tuple[Net, Tensor, Tensor]:
    torch.manual_seed(0)
    net = Net(optional=optional).to(dtype)
    return net, torch.randn(8, 5).to(dtype), torch.randn(8, 2).to(dtype)


def part_of(rank: int, parts: int, whole: Tensor) -> Tensor:
    """What a rank has of every micro-batch."""
    return torch.cat([piece.chunk(RANKS)[rank] for piece in whole.chunk(parts)])


def closures_of(
    optimizer: Any,
    model: Callable[..., Tensor],
    x: Tensor,
    y: Tensor,
    parts: int,
    use: Sequence[bool] = (True,),
) -> list[Callable[[], Tensor]]:
    """Return a closure for each of equal parts of a batch; ``use`` says which use all layers."""

    def closure(x: Tensor, y: Tensor, used: bool) -> Tensor:
        if parts == 1:
            optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x, used), y)
        loss.backward()
        return loss

    used = [use[i % len(use)] for i in range(parts)]
    pieces = zip(x.chunk(parts), y.chunk(parts), used, strict=True)
    return [functools.partial(closure, *piece) for piece in pieces]


def train(optimizer: Any, closures: list[Callable[[], Tensor]], *, as_list: bool) -> None:
    for _ in range(STEPS):
        optimizer.step(closures if as_list else closures[0])


def train_by_calls(optimizer: Any, model: Any, closure: Callable[[], Tensor], every: bool) -> None:
    """The two- or three-call form; ``every``: no evaluation is averaged by the model."""
    calls = (optimizer.first_step, optimizer.second_step, optimizer.third_step)
    for _ in range(STEPS):
        for number, call in enumerate(calls[: optimizer.evaluations]):
            apart = not optimizer.is_plain_step and (number == 0 or every)
            with model.no_sync() if apart else nullcontext():
                closure()
            call(zero_grad=number == 0)
            if not optimizer.is_perturbed:
                break


def flat(params: Any) -> Tensor:
    return torch.cat([param.detach().reshape(-1) for param in params])


# ---- the scope "local" ---------------------------------------------------------------------------

PARALLEL: dict[str, dict[str, Any]] = {
    "ddp": {},
    "views": {"gradient_as_bucket_view": True},
    "static": {"static_graph": True},
    "unused": {"find_unused_parameters": True},
}


class Case(NamedTuple):
    """One training; ``parts`` is 0 for a step call by call, else how many closures it has."""

    method: str
    base: str
    option: str = "plain"
    parallel: str = "ddp"
    parts: int = 1
    dtype: torch.dtype = torch.float64
    backend: str = "auto"


def optimizer_of(params: Any, case: Case, **more: Any) -> Any:
    options = {**OPTIONS[case.option], "backend": case.backend, **more}
    return METHODS[case.method](params, BASES[case.base], **options)


LOCAL: list[Case] = [
    *(Case(method, "sgdm") for method in METHODS),
    *(Case(method, "adamw", parallel="views") for method in METHODS),
    *(Case(method, "sgdm", "adaptive", "unused", backend="eager") for method in METHODS),
    *(Case(method, "adamw", "clip") for method in METHODS),
    *(Case(method, "sgdm", "every", parts=0) for method in METHODS),
    *(Case(method, "adamw", "every") for method in ("sam", "wsam", "gsam")),
    *(Case(method, "adamw", "every", parts=2) for method in ("sam", "wsam", "gsam", "gsam-0")),
    *(Case(method, "sgdm", "plain", "views", parts=2) for method in ("sam", "wsam", "gsam")),
    *(Case(method, "rmsprop") for method in ("sam", "wsam", "gsam")),
    # Here rounding shows: replicas have to be equal bit by bit.
    *(Case(method, "adamw", dtype=torch.float32) for method in METHODS),
    *(Case(method, "adamw", dtype=torch.bfloat16) for method in METHODS),
]


def parallel_run(rank: int, case: Case, scope: str) -> Tensor:
    """Train with this process as one of several."""
    net, x, y = problem(case.dtype)
    model = DistributedDataParallel(net, **PARALLEL[case.parallel])
    # Call by call nothing needs the model; the ranks are those given, or all.
    group = dist.group.WORLD if case.method == "wsam" else None
    told: dict[str, Any] = {"model": model} if case.parts else {"process_group": group}
    optimizer = optimizer_of(model.parameters(), case, perturb_scope=scope, **told)
    pieces = max(case.parts, 1)
    closures = closures_of(
        optimizer, model, part_of(rank, pieces, x), part_of(rank, pieces, y), pieces
    )
    if case.parts:
        train(optimizer, closures, as_list=case.parts > 1)
    else:
        train_by_calls(optimizer, model, closures[0], case.method in ("gsam", "gsam-0", "bsam"))
    return flat(net.parameters())


def apart_in_one(case: Case) -> Tensor:
    """The scope "local" with one process: every part of a rank is a micro-batch."""
    net, x, y = problem(case.dtype)
    if case.method == "bsam":
        return _bsam(net, x, y, case.base, case.option)
    optimizer = optimizer_of(net.parameters(), case._replace(backend="eager"))
    closures = closures_of(optimizer, net, x, y, RANKS * max(case.parts, 1))
    train(optimizer, closures, as_list=True)
    return flat(net.parameters())


def together_in_one(case: Case) -> Tensor:
    """The scope "global" with one process."""
    net, x, y = problem(case.dtype)
    optimizer = optimizer_of(net.parameters(), case._replace(backend="eager"))
    train(optimizer, closures_of(optimizer, net, x, y, 1), as_list=False)
    return flat(net.parameters())


def _bsam(net: Net, x: Tensor, y: Tensor, base: str, option: str) -> Tensor:
    """The mean of what BSAM feeds to its base optimizer for each part, in plain torch."""
    params = list(net.parameters())
    optimizer = BASES[base](params)
    options = OPTIONS[option]
    for step in range(1, STEPS + 1):
        parts = list(zip(x.chunk(RANKS), y.chunk(RANKS), strict=True))
        rows = []
        for part in parts:
            g1 = _gradient(net, params, *part)
            if step % options.get("every", 1):
                rows.append(g1)
                continue
            metric = flat(params).square() if options.get("adaptive") else torch.ones_like(g1)
            e = metric * g1 / ((metric * g1 * g1).sum().sqrt() + 1e-12)
            g2 = _gradient(net, params, *part, move=options["rho"] * e)
            g3 = _gradient(net, params, *part, move=-0.2 * e)
            rows.append(g1 + g2 - g2.norm() / g3.norm() * g3)
        h = torch.stack(rows).mean(0)
        for param, part_of_h in zip(params, h.split([p.numel() for p in params]), strict=True):
            param.grad = part_of_h.view_as(param)
        if options.get("max_grad_norm"):
            nn.utils.clip_grad_norm_(params, options["max_grad_norm"])
        optimizer.step()
    return flat(params)


def _gradient(
    net: Net, params: list[nn.Parameter], x: Tensor, y: Tensor, move: Tensor | None = None
) -> Tensor:
    saved = flat(params)
    if move is not None:
        nn.utils.vector_to_parameters(saved + move, params)
    grads = torch.autograd.grad(nn.functional.mse_loss(net(x), y), params)
    nn.utils.vector_to_parameters(saved, params)
    return torch.cat([grad.reshape(-1) for grad in grads])


# ---- the scope "global" --------------------------------------------------------------------------

GLOBAL: list[Case] = [
    Case(method, base, parallel=parallel)
    for method in ("sam", "wsam", "gsam", "bsam")
    for base, parallel in (("sgdm", "static"), ("adamw", "static"), ("sgdm", "views"))
]

# ---- parameters that not all ranks use -----------------------------------------------------------

UNEVEN: list[tuple[Case, str]] = [
    *(
        (Case(method, base), "global")
        for method in ("sam", "wsam", "gsam", "bsam")
        for base in ("sgdm", "adamw")
    ),
    *((Case(m, base), "local") for m in ("sam", "wsam", "gsam") for base in ("sgdm", "adamw")),
]


def uneven_run(rank: int, case: Case, scope: str) -> Tensor:
    """Train where rank 1 does not use a layer, and nobody uses another."""
    net, x, y = problem(optional=True)
    model = DistributedDataParallel(net, find_unused_parameters=True)
    optimizer = optimizer_of(model.parameters(), case, model=model, perturb_scope=scope)
    x, y = part_of(rank, 1, x), part_of(rank, 1, y)
    train(optimizer, closures_of(optimizer, model, x, y, 1, [rank == 0]), as_list=False)
    return flat(net.parameters())


def uneven_in_one(case: Case, scope: str) -> Tensor:
    """The same with one process."""
    net, x, y = problem(optional=True)
    optimizer = optimizer_of(net.parameters(), case._replace(backend="eager"))
    closures = closures_of(optimizer, net, x, y, RANKS, [True, False])

    def both() -> Tensor:
        optimizer.zero_grad()
        losses = [closure() for closure in closures]
        for param in net.parameters():
            if param.grad is not None:
                param.grad /= RANKS
        return torch.stack(losses).mean()

    train(optimizer, closures if scope == "local" else [both], as_list=scope == "local")
    return flat(net.parameters())
