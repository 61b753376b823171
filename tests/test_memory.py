"""Memory at the peak of a step, in lists of the parameters' size: what docs/methods.md says."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import METHODS
from torch import Tensor

from benchmarks.recorded_memory import peak_of
from wsam_fused import ESAM, RWSAM

TENSORS, SIZE = 40, 10_000  # a backward of one tensor needs three more of its size
CLOSURES = ["sam", "wsam", "coupled", "gsam", "gnp"]


def peak(
    make: Callable[..., Any],
    what: Callable[[list[Any], Any], Any],
    *,
    in_backward: bool = False,
    **options: Any,
) -> float:
    """Return the peak of a step: scratch, and all gradients but one list.

    Args:
        make: The method.
        what: Gives what ``step`` is given.
        in_backward: Update within the backward.
        options: Of the method.
    """
    params = [torch.nn.Parameter(torch.full((SIZE,), 0.1)) for _ in range(TENSORS)]
    optimizer = make(params, functools.partial(torch.optim.SGD, lr=0.1), **options)
    if in_backward:
        optimizer.update_in_backward()
    given = what(params, optimizer)

    def steps() -> None:
        for _ in range(3):  # from the first step on: what is kept between steps counts
            optimizer.step(given)

    return peak_of(steps) / (4 * TENSORS * SIZE) - 1.0


def closure(params: list[Any], optimizer: Any) -> Callable[[], Tensor]:
    def evaluate() -> Tensor:
        optimizer.zero_grad()
        return one_by_one(params)

    return evaluate


def closures(params: list[Any], optimizer: Any) -> list[Callable[[], Tensor]]:
    return [functools.partial(one_by_one, params)] * 4


def one_by_one(params: list[Any]) -> Tensor:
    """Differentiate so that no graph of the whole list is what is measured."""
    losses = []
    for param in params:
        loss = param.square().sum()
        loss.backward()
        losses.append(loss.detach())
    return torch.stack(losses).sum()


def losses_fn(params: list[Any], optimizer: Any) -> Callable[..., Tensor]:
    slopes = [torch.full((2, SIZE), 0.1) for _ in params]

    def evaluate(index: Tensor | None = None) -> Tensor:
        losses = torch.zeros(2)
        for param, slope in zip(params, slopes, strict=True):
            losses = losses + slope @ param
        return losses if index is None else losses[index]

    return evaluate


@pytest.mark.parametrize(
    ("method", "lists"), [*((name, 1) for name in CLOSURES), ("bsam", 2), ("bsam-as-published", 2)]
)
def test_scratch_of_a_step(method: str, lists: int) -> None:
    assert peak(METHODS[method], closure) == pytest.approx(lists, abs=0.25)


@pytest.mark.parametrize(
    ("method", "lists"), [("sam", 1), ("wsam", 2), ("coupled", 2), ("gsam", 2), ("bsam", 3)]
)
@pytest.mark.parametrize("geometry", ["adaptive", "fisher"])
def test_other_geometries_keep_a_copy(method: str, lists: int, geometry: str) -> None:
    assert peak(METHODS[method], closure, geometry=geometry) == pytest.approx(lists, abs=0.25)


@pytest.mark.parametrize(
    ("make", "lists"),
    [
        (functools.partial(ESAM, beta=1.0), 1),
        (functools.partial(ESAM, beta=1.0, geometry="adaptive"), 1),
        (RWSAM, 2),
    ],
    ids=["ESAM", "ESAM adaptive", "RWSAM"],
)
def test_methods_with_losses_of_samples(make: Callable[..., Any], lists: int) -> None:
    assert peak(make, losses_fn) == pytest.approx(lists, abs=0.25)


@pytest.mark.parametrize("method", CLOSURES)
def test_micro_batches_take_at_most_one_list_more(method: str) -> None:
    assert peak(METHODS[method], closures) <= peak(METHODS[method], closure) + 1.0 + 0.25


@pytest.mark.parametrize(
    ("method", "geometry", "lists"),
    [
        *((name, "euclidean", 0) for name in CLOSURES if name != "gsam"),
        ("sam", "adaptive", 0),  # the copy of w is in the memory of g1
        ("wsam", "adaptive", 1),
    ],
)
def test_updates_in_the_backward_keep_one_list_less(method: str, geometry: str, lists: int) -> None:
    """What is left are both gradients of one tensor, and what its backward needs."""
    found = peak(METHODS[method], closure, in_backward=True, geometry=geometry)
    assert found == pytest.approx(lists, abs=0.2)


@pytest.mark.parametrize("make", [functools.partial(ESAM, beta=1.0), RWSAM], ids=["ESAM", "RWSAM"])
def test_updates_in_the_backward_of_losses_of_samples(make: Callable[..., Any]) -> None:
    assert peak(make, losses_fn, in_backward=True) == pytest.approx(0, abs=0.25)
