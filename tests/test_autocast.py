"""Steps inside one autocast context, which keeps 16-bit copies of the weights."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import BASES, METHODS
from per_sample_cases import METHODS as PER_SAMPLE_METHODS
from torch import Tensor, nn

ALL_METHODS = {**METHODS, **PER_SAMPLE_METHODS}


class Case:
    """A net of which autocast casts all weights."""

    def __init__(self, method: str, backend: str, **options: Any) -> None:
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
        self.x, self.y = torch.randn(16, 8), torch.randint(4, (16,))
        self.optimizer = ALL_METHODS[method](
            self.net.parameters(), BASES["sgd"], rho=1.0, backend=backend, **options
        )
        self.seen: list[float] = []
        self.step: Callable[[], Any] = functools.partial(
            self.optimizer.step,
            self.losses if method in PER_SAMPLE_METHODS else self.closure,
        )

    def losses(self, index: Tensor | None = None) -> Tensor:
        x, y = (self.x, self.y) if index is None else (self.x[index], self.y[index])
        with torch.autocast("cpu", torch.bfloat16):  # the inner one keeps what the outer one has
            logits = self.net(x)
        losses = nn.functional.cross_entropy(logits.float(), y, reduction="none")
        self.seen.append(losses.detach().mean().item())
        return losses

    def closure(self) -> Tensor:
        self.optimizer.zero_grad()
        loss = self.losses().mean()
        loss.backward()
        return loss


@pytest.mark.parametrize("method", ["sam", "wsam", "gsam", "bsam", *PER_SAMPLE_METHODS])
def test_one_context_around_all_is_like_one_around_each_forward(method: str, backend: str) -> None:
    whole, parts = Case(method, backend), Case(method, backend)
    for _ in range(3):
        parts.step()
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(3):
            whole.step()
    assert whole.seen == parts.seen
    assert len(set(whole.seen)) == len(whole.seen), "an evaluation saw the weights of another"
    pairs = zip(whole.net.parameters(), parts.net.parameters(), strict=True)
    assert all(torch.equal(ours, expected) for ours, expected in pairs)


def test_micro_batches(backend: str) -> None:
    whole, parts = Case("sam", backend), Case("sam", backend)

    def backward(case: Case) -> Tensor:
        loss = case.losses().mean()
        loss.backward()
        return loss

    parts.optimizer.step([functools.partial(backward, parts)] * 2)
    with torch.autocast("cpu", torch.bfloat16):
        whole.optimizer.step([functools.partial(backward, whole)] * 2)
    assert whole.seen == parts.seen
    assert whole.seen[0] == whole.seen[2] != whole.seen[1]
