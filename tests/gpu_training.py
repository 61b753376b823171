"""A model that the tests train on a GPU."""

from __future__ import annotations

import functools
from typing import Any

import torch
from cases import METHODS, call
from torch import Tensor


class Training:
    """A model whose losses are element-wise, so that nothing but the optimizer could vary.

    Args:
        backend: Of the optimizer.
        lr: Learning rate, a number or a tensor on the GPU.
        method: By name.
        dtype: Of the parameters.
        options: Of the optimizer.
    """

    def __init__(
        self,
        backend: str,
        lr: Any,
        method: str = "wsam",
        dtype: torch.dtype = torch.float32,
        **options: Any,
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        shapes = [(257, 33), (1000,), (3,), (64, 64)]
        values = [torch.randn(shape, generator=generator).cuda().to(dtype) for shape in shapes]
        self.params = [torch.nn.Parameter(value) for value in values]
        self.inputs = [torch.ones_like(value) for value in values]
        options = {"rho": 0.5, **options}
        base = functools.partial(torch.optim.AdamW, lr=lr)
        self.optimizer = METHODS[method](self.params, base, backend=backend, **options)

    def loss(self) -> Tensor:
        pairs = zip(self.params, self.inputs, strict=True)
        return sum((((x * p).sin() - 0.1) ** 2).sum() for p, x in pairs)  # type: ignore[return-value]

    def step(self) -> None:
        self.optimizer.zero_grad()
        for evaluation in range(self.optimizer.evaluations):
            self.loss().backward()
            call(self.optimizer, evaluation)

    def step_with_scaler(self, scaler: torch.amp.GradScaler, form: str) -> None:
        """One step whose losses are scaled, with a closure or call by call."""
        optimizer = self.optimizer

        def closure() -> Tensor:
            loss = self.loss()
            scaler.scale(loss).backward()
            return loss

        if form == "closure":
            optimizer.step(closure, scaler=scaler)
        else:
            optimizer.zero_grad()
            closure()
            optimizer.first_step(zero_grad=True, scaler=scaler)
            for evaluation in range(1, optimizer.evaluations - 1):
                closure()
                call(optimizer, evaluation)
            closure()
            scaler.step(optimizer)
        scaler.update()

    def set_inputs(self, number: int) -> None:
        generator = torch.Generator().manual_seed(number)
        for x in self.inputs:
            x.copy_(torch.randn(x.shape, generator=generator))

    def state(self) -> list[Tensor]:
        entries = [self.optimizer.state[param] for param in self.params]
        return [param.detach().clone() for param in self.params] + [
            value.clone() for entry in entries for value in entry.values()
        ]
