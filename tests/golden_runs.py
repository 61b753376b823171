"""Runs the cases of the golden trajectories."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from problems import INDEX, Problem, array
from torch import Tensor

from wsam_fused import BSAM, ESAM, GSAM, RWSAM, SAM, WSAM

BASES = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
RANK_CASES = [case for case in INDEX["cases"] if "ranks" in case]
CASES = [case for case in INDEX["cases"] if case["problem"] != "toy" and "ranks" not in case]
TOY_CASES = [case for case in INDEX["cases"] if case["problem"] == "toy"]


class ReplayedESAM(ESAM):
    """Takes the recorded choices of tensors and samples, and checks the samples against its own."""

    def __init__(self, *args: Any, case: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.case = case

    def _inactive(self) -> list[Tensor]:
        active = array(self.case, "perturbed")[self._steps()]
        pairs = zip(self.param_groups[0]["params"], active, strict=True)
        return [param for param, is_active in pairs if not is_active]

    def _select(self, rises: Tensor, wanted: int) -> Tensor:
        recorded = torch.as_tensor(array(self.case, "selected")[self._steps()]).nonzero().flatten()
        # The authors' code takes one sample less than the share says.
        ours = super()._select(rises, int(rises.numel() * self.param_groups[0]["gamma"]) - 1)
        assert recorded.tolist() == ours.tolist()
        return recorded


class ReplayedRWSAM(RWSAM):
    """Probes along the recorded noise."""

    def __init__(self, *args: Any, case: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.case = case

    @torch.no_grad()
    def _probe(self, losses_fn: Any) -> Tensor:
        params, delta = self.param_groups[0]["params"], self.param_groups[0]["delta"]
        saved = [param.clone() for param in params]
        noise = torch.as_tensor(array(self.case, "z")[self._steps()])
        parts = noise.split([param.numel() for param in params])
        for param, part in zip(params, parts, strict=True):
            param.add_(part.to(param.dtype).view_as(param), alpha=delta)
        losses: Tensor = losses_fn()
        torch._foreach_copy_(params, saved)
        return losses


def make_optimizer(case: dict[str, Any], problem: Problem, backend: str, **options: Any) -> Any:
    hyper, base = case["hyper"], case["base"]
    options |= {
        "max_grad_norm": hyper.get("max_norm"),
        "eps": hyper.get("eps", 1e-12),
        "every": hyper.get("interval", 1),
        "backend": backend,
    }
    if case["geometry"] == "fisher":
        options |= {"geometry": "fisher", "eta": hyper["eta"]}
    elif case["geometry"] == "abs+eta[weight]":
        options |= {"geometry": "adaptive", "eta": hyper["eta"], "only_weights": True}
    elif case["geometry"] == "abs":
        options["adaptive"] = True
    params: list[Any] = list(zip(problem.names, problem.params, strict=True))
    if "groups" in case:
        own = [{k: v for k, v in group.items() if k != "tensors"} for group in case["groups"]]
        params = [
            {**rest, "params": [params[i] for i in group["tensors"]]}
            for rest, group in zip(own, case["groups"], strict=True)
        ]
    bound = functools.partial(BASES[base["name"]], **base["kwargs"])
    return _method(case)(params, bound, **options)


def _method(case: dict[str, Any]) -> Any:
    hyper, name = case["hyper"], case["name"]
    return {
        "sam": SAM,
        "asam": SAM,
        "fishersam": SAM,
        "msam": SAM,
        "wsam": functools.partial(WSAM, gamma=hyper.get("gamma")),
        "wsam_coupled": functools.partial(WSAM, gamma=hyper.get("gamma"), decouple=False),
        "gsam": functools.partial(GSAM, alpha=hyper.get("alpha")),
        "bsam": BSAM,
        "bsam_asrun": functools.partial(BSAM, as_published=True),
        "esam": functools.partial(
            ReplayedESAM, case=name, beta=hyper.get("beta"), gamma=hyper.get("gamma")
        ),
        "rwsam": functools.partial(
            ReplayedRWSAM, case=name, lam=hyper.get("lam"), delta=hyper.get("delta")
        ),
    }[case["method"]]


def label(case: dict[str, Any]) -> tuple[str, str]:
    """Name the case's method and geometry as the table in docs/methods.md does."""
    names = {
        "asam": "SAM",
        "fishersam": "SAM",
        "msam": "SAM, micro-batches",
        "wsam_coupled": "Coupled-WSAM",
        "bsam_asrun": "BSAM, as published",
    }
    geometry = {"l2": "euclidean", "fisher": "fisher"}.get(case["geometry"], "adaptive")
    return names.get(case["method"], case["method"].upper()), geometry


def trajectory(case: dict[str, Any], dtype: torch.dtype, backend: str) -> np.ndarray:
    """Run the case and return the parameters after the recorded steps."""
    problem = Problem(case["problem"], dtype)
    return train(case, problem, make_optimizer(case, problem, backend))


def train(case: dict[str, Any], problem: Problem, optimizer: Any) -> np.ndarray:
    """Make the steps of a case and return the parameters after the recorded ones."""
    steps = array(case["name"], "steps")
    keys = ["lr", "rho"] + ["rho_min"] * (case["method"] in ("bsam", "bsam_asrun"))
    values = {key: array(case["name"], key) for key in keys}
    found = []
    for step in range(1, int(steps[-1]) + 1):
        for i, group in enumerate(optimizer.param_groups):
            for key, of_steps in values.items():
                of_step = np.atleast_1d(of_steps[step - 1])
                group[key] = float(of_step[i if of_steps.ndim > 1 else 0])
        optimizer.step(_evaluation(case, problem, optimizer, step))
        if step in steps:
            found.append(problem.flat().numpy().copy())
    return np.stack(found)


def _evaluation(case: dict[str, Any], problem: Problem, optimizer: Any, step: int) -> Any:
    """What the case's optimizer is given: a closure, closures, or losses of samples."""
    if case["method"] in ("esam", "rwsam"):
        return functools.partial(problem.losses, step)
    if case["method"] == "msam":
        size, batch = case["hyper"]["m"], len(problem.batches[step - 1])
        parts = [slice(start, start + size) for start in range(0, batch, size)]
        return [lambda part=part: _evaluated(problem.losses(step, part).mean()) for part in parts]

    def closure() -> Tensor:
        optimizer.zero_grad()
        return _evaluated(problem.loss(step))

    return closure


def _evaluated(loss: Tensor) -> Tensor:
    loss.backward()
    return loss
