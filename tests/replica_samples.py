"""ESAM and RWSAM on several ranks, and the same formulas in plain torch in one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from replica_runs import BASES, RANKS, STEPS, Net, flat, part_of, problem
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from wsam_fused import ESAM, RWSAM
from wsam_fused.method_keys import STEP

OPTIONS: dict[str, dict[str, Any]] = {
    "esam": {"rho": 0.3, "beta": 0.5, "gamma": 0.5, "seed": 3},
    "rwsam": {"rho": 0.3, "lam": 2.0, "delta": 1e-3, "seed": 3},
}
# Method, scope, whether the optimizer is told of the model.
CASES = [
    ("esam", "global", False),
    ("esam", "global", True),
    ("esam", "local", True),
    ("rwsam", "global", True),
    ("rwsam", "local", True),
]


def optimizer_of(method: str, params: Any, **more: Any) -> Any:
    kind = {"esam": ESAM, "rwsam": RWSAM}[method]
    return kind(params, BASES["sgdm"], **OPTIONS[method], **more)


def losses(model: Callable[..., Tensor], x: Tensor, y: Tensor) -> Callable[..., Tensor]:
    def losses_fn(index: Tensor | None = None) -> Tensor:
        inputs, targets = (x, y) if index is None else (x[index], y[index])
        return (model(inputs) - targets).square().mean(1)

    return losses_fn


def run(rank: int, method: str, scope: str, told: bool) -> Tensor:
    net, x, y = problem()
    model = DistributedDataParallel(net)
    given = model if told else None
    optimizer = optimizer_of(method, model.parameters(), model=given, perturb_scope=scope)
    losses_fn = losses(model, part_of(rank, 1, x), part_of(rank, 1, y))
    for _ in range(STEPS):
        optimizer.step(losses_fn)
    return flat(net.parameters())


def poisoned(rank: int, method: str, scope: str, told: bool) -> tuple[list[Tensor], float]:
    """Weights after every step, and how many were skipped; losses of rank 0 are NaN in one."""
    net, x, y = problem()
    model = DistributedDataParallel(net)
    given = model if told else None
    optimizer = optimizer_of(method, model.parameters(), model=given, perturb_scope=scope)
    losses_fn = losses(model, part_of(rank, 1, x), part_of(rank, 1, y))
    calls = step = 0

    def first_is_nan(index: Tensor | None = None) -> Tensor:
        nonlocal calls
        calls += 1
        factor = float("nan") if (rank, step, calls) == (0, 1, 1) else 1.0
        return losses_fn(index) * factor

    weights = [flat(net.parameters())]
    for step in range(3):  # noqa: B007  (the closure reads it)
        calls = 0
        optimizer.step(first_is_nan)
        weights.append(flat(net.parameters()))
    return weights, float(optimizer.skipped_steps)


def in_one(method: str, scope: str) -> Tensor:
    net, x, y = problem()
    params = list(net.parameters())
    base = BASES["sgdm"](params)
    chooser = optimizer_of(method, params, backend="eager")  # never stepped: it draws
    parts = [(part_of(rank, 1, x), part_of(rank, 1, y)) for rank in range(RANKS)]
    for step in range(STEPS):
        chooser.param_groups[0][STEP] = step
        first = (_esam_first if method == "esam" else _rwsam_first)(chooser, net, parts, scope)
        if scope == "global":
            first = [torch.stack(first).mean(0)] * RANKS
        radius = OPTIONS[method]["rho"] / OPTIONS[method].get("beta", 1.0)
        second = []
        for g1, part in zip(first, parts, strict=True):
            w = flat(params)
            at_w = losses(net, *part)().detach()
            nn.utils.vector_to_parameters(w + radius * g1 / (g1.norm() + 1e-12), params)
            of_samples = losses(net, *part)()
            if method == "esam":
                rises = of_samples.detach() - at_w
                of_samples = of_samples[rises.topk(len(rises) // 2).indices]
            second.append(_gradient(of_samples.mean(), params))
            nn.utils.vector_to_parameters(w, params)
        mean = torch.stack(second).mean(0)
        for param, grad in zip(params, mean.split([p.numel() for p in params]), strict=True):
            param.grad = grad.view_as(param)
        base.step()
    return flat(params)


def _esam_first(
    chooser: Any, net: Net, parts: list[tuple[Tensor, Tensor]], scope: str
) -> list[Tensor]:
    inactive = {id(param) for param in chooser._inactive()}
    keep = torch.cat(
        [torch.full((p.numel(),), float(id(p) not in inactive)) for p in net.parameters()]
    )
    params = list(net.parameters())
    return [keep * _gradient(losses(net, *part)().mean(), params) for part in parts]


def _rwsam_first(
    chooser: Any, net: Net, parts: list[tuple[Tensor, Tensor]], scope: str
) -> list[Tensor]:
    lam, delta = OPTIONS["rwsam"]["lam"], OPTIONS["rwsam"]["delta"]
    norms = []
    for part in parts:
        probed = chooser._probe(losses(net, *part))
        norms.append((probed - losses(net, *part)().detach()).abs() / delta)
    if scope == "global":
        weights = (lam * torch.cat(norms)).softmax(0).chunk(RANKS)
        weights = [RANKS * each for each in weights]
    else:
        weights = [(lam * each).softmax(0) for each in norms]
    params = list(net.parameters())
    return [
        _gradient(weight @ losses(net, *part)(), params)
        for weight, part in zip(weights, parts, strict=True)
    ]


def _gradient(loss: Tensor, params: list[nn.Parameter]) -> Tensor:
    return torch.cat([grad.reshape(-1) for grad in torch.autograd.grad(loss, params)])
