"""The deterministic problems of the golden trajectories."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

FOLDER = Path(__file__).parent / "golden"
INDEX: dict[str, Any] = json.loads((FOLDER / "index.json").read_text())
_ARRAYS = np.load(FOLDER / "trajectories.npz")


def array(case: str, name: str) -> np.ndarray:
    return _ARRAYS[f"{case}/{name}"]


class Problem:
    """A problem's parameters and the losses of a step's mini-batch.

    With x, a, c, z the inputs: l = x W + b, k = (a, c) contracted with T and padded with zeros,
    t = z v. Kind ``logit`` is the cross entropy of s tanh(l) + k + t r; kind ``quad`` half the
    squared error of l + k + t r + s u.
    """

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        self.name = name
        info = INDEX["problems"][name]
        self.names = [p["name"] for p in info["params"]]
        self.shapes = [tuple(p["shape"]) for p in info["params"]]
        self.dtype = dtype
        if name == "toy":
            self.terms = info["terms"]
            start = np.array(info["w0"])
        else:
            self.data = {n: self._tensor(n) for n in ("x", "a", "c", "z", "r", "u")}
            self.y = torch.as_tensor(array(f"problem-{name}", "y"))
            self.batches = array(f"problem-{name}", "batches")
            start = array(f"problem-{name}", "w0")
        flat = torch.as_tensor(start).to(dtype)
        sizes = [int(np.prod(shape)) for shape in self.shapes]
        self.params = [
            torch.nn.Parameter(part.reshape(shape).clone())
            for part, shape in zip(flat.split(sizes), self.shapes, strict=True)
        ]

    def _tensor(self, name: str) -> Tensor:
        return torch.as_tensor(array(f"problem-{self.name}", name)).to(self.dtype)

    def flat(self) -> Tensor:
        return torch.cat([p.detach().reshape(-1) for p in self.params])

    def loss(self, step: int) -> Tensor:
        """Mean loss of the mini-batch of ``step``, which counts from 1."""
        return self._toy_loss() if self.name == "toy" else self.losses(step).mean()

    def losses(self, step: int, index: Tensor | slice | None = None) -> Tensor:
        """Losses of the samples of the mini-batch, or of some of them."""
        rows = torch.as_tensor(self.batches[step - 1])
        rows = rows if index is None else rows[index]
        weight, bias, core, scale, tail = self.params
        x, a, c, z = (self.data[n][rows] for n in ("x", "a", "c", "z"))
        linear = x @ weight + bias
        k = torch.einsum("ni,nj,ijk->nk", a, c, core)
        k = torch.nn.functional.pad(k, (0, linear.shape[1] - k.shape[1]))
        rest = k + (z @ tail)[:, None] * self.data["r"]
        scale = scale.reshape(())
        if self.name == "logit":
            outputs = scale * torch.tanh(linear) + rest
            targets = self.y[rows].long()
            return torch.nn.functional.cross_entropy(outputs, targets, reduction="none")
        outputs = linear + rest + scale * self.data["u"]
        return 0.5 * ((outputs - self.y[rows].to(self.dtype)) ** 2).sum(1)

    def _toy_loss(self) -> Tensor:
        mu, sigma = self.params[0]
        total = torch.zeros((), dtype=self.dtype)
        for term in self.terms:
            divergence = (
                torch.log(term["sigma"] / sigma)
                + (sigma**2 + (mu - term["mu"]) ** 2) / (2 * term["sigma"] ** 2)
                - 0.5
            )
            total = total + term["weight"] * torch.exp(-divergence / term["temperature"] ** 2)
        return -torch.log(total)
