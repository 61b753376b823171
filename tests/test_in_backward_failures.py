"""What goes wrong within a backward that updates, and what cannot be updated there at all."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from in_backward_cases import Net, chain, chain_loss, closure_of, values_of
from tolerances import PERTURBED, close
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, AdamW, RMSprop

from wsam_fused import BSAM, ESAM, GSAM, SAM, WSAM


class Stop(BaseException):
    """As KeyboardInterrupt: nothing that code should catch."""


class Fails(torch.autograd.Function):
    """Its backward raises an error if there is one."""

    error: BaseException | None = None

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        if Fails.error is not None:
            raise Fails.error
        return gradients[0]


def failing_net() -> tuple[nn.Sequential, Callable[[], Tensor]]:
    """A net that fails in its middle, if at all, and its loss."""
    net, x, y = chain()

    def loss() -> Tensor:
        return (net[2:](Fails.apply(net[:2](x))) - y).square().mean()

    return net, loss


@pytest.mark.parametrize("restore", ["recompute", "backup"])
@pytest.mark.parametrize("error", [RuntimeError("in the middle"), Stop()], ids=["error", "signal"])
@pytest.mark.parametrize("calls", [False, True], ids=["closure", "two calls"])
def test_an_error_in_the_middle_restores_what_has_not_been_updated(
    restore: str, error: BaseException, calls: bool, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, loss_of = failing_net()
    optimizer = WSAM(net.parameters(), AdamW, lr=0.01, restore=restore, backend=backend)
    optimizer.update_in_backward()
    before = values_of(net.parameters())
    evaluations = 0

    def closure() -> Tensor:
        nonlocal evaluations
        evaluations += 1
        optimizer.zero_grad()
        loss = loss_of()
        if evaluations == 2:
            monkeypatch.setattr(Fails, "error", error)
        loss.backward()
        return loss

    with pytest.raises(type(error)):
        if calls:
            closure()
            optimizer.first_step(zero_grad=True)
            closure()
        optimizer.step(closure)
    if calls:
        assert optimizer.is_perturbed
        optimizer.restore()
    assert not optimizer.is_perturbed
    first, *others = net.parameters()
    close(first.detach(), before[0], PERTURBED[torch.float32], "restored")
    assert restore == "recompute" or torch.equal(first, before[0])
    assert not any(map(torch.equal, others, before[1:])), "these had been updated"
    counts = [optimizer.state[param]["step"].item() for param in net.parameters()]
    assert counts == [0.0, 1.0, 1.0]
    monkeypatch.setattr(Fails, "error", None)
    optimizer.step(closure)
    assert [optimizer.state[p]["step"].item() for p in net.parameters()] == [1.0, 2.0, 2.0]


def test_two_backwards_of_one_evaluation(backend: str) -> None:
    net, x, y = chain()
    optimizer = SAM(net.parameters(), AdamW, lr=0.01, restore="backup", backend=backend)
    handle = optimizer.update_in_backward()
    before = values_of(net.parameters())

    def closure() -> Tensor:
        optimizer.zero_grad()
        whole = torch.zeros(())
        for rows in (slice(0, 2), slice(2, 5)):
            loss = chain_loss(net[-2:] if rows.start == 0 else net, inputs(rows), y[rows])
            loss.backward()
            whole = whole + loss.detach()
        return whole

    def inputs(rows: slice) -> Tensor:
        return net[:-2](x[rows]).detach() if rows.start == 0 else x[rows]

    with pytest.raises(RuntimeError, match=r"of shape \(3, 16\) was completed twice.*remove\(\)"):
        optimizer.step(closure)
    assert not optimizer.is_perturbed
    assert list(map(torch.equal, before, net.parameters())) == [True, True, False]
    handle.remove()
    optimizer.step(closure)
    assert not any(map(torch.equal, before, net.parameters()))


def test_two_backwards_restore_without_a_closure() -> None:
    net, x, y = chain()
    optimizer = SAM(net.parameters(), SGD, lr=0.0, restore="backup")
    optimizer.update_in_backward()
    before = values_of(net.parameters())
    chain_loss(net, x, y).backward()
    optimizer.first_step(zero_grad=True)
    chain_loss(net[-2:], net[:-2](x).detach(), y).backward()
    with pytest.raises(RuntimeError, match="was completed twice in one evaluation"):
        chain_loss(net, x, y).backward()
    assert not optimizer.is_perturbed
    assert all(map(torch.equal, before, net.parameters()))
    with pytest.raises(RuntimeError, match=r"second_step\(\) was called before first_step\(\)"):
        optimizer.second_step()


def test_weights_that_the_rest_of_the_backward_still_needs() -> None:
    """Autograd notices: what it saved of them is outdated."""
    net = nn.ParameterList(nn.Parameter(torch.full((4,), value)) for value in (1.0, 2.0))
    optimizer = SAM(net, SGD, lr=0.1, restore="backup")
    optimizer.update_in_backward()
    before = values_of(net)

    def closure() -> Tensor:
        optimizer.zero_grad()
        early = (net[0] * net[1].detach()).sum()  # is differentiated last, and needs net[1] then
        loss = early + net[1].square().sum()
        loss.backward()
        return loss

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        optimizer.step(closure)
    assert not optimizer.is_perturbed
    assert torch.equal(net[0], before[0])


def test_a_bad_value_is_found_before_anything_is_updated() -> None:
    net, x, y = chain()
    optimizer = SAM(net.parameters(), SGD, lr=0.1, restore="backup")
    optimizer.update_in_backward()
    before = values_of(net.parameters())
    chain_loss(net, x, y).backward()
    optimizer.first_step(zero_grad=True)
    optimizer.param_groups[0]["lr"] = float("nan")
    with pytest.raises(ValueError, match="lr is nan"):
        chain_loss(net, x, y).backward()
    assert not optimizer.is_perturbed
    assert all(map(torch.equal, before, net.parameters()))


def test_a_gradient_that_cannot_be_used() -> None:
    weights = nn.Embedding(50, 4, sparse=True)
    other = nn.Parameter(torch.ones(()))
    optimizer = SAM([weights.weight, other], SGD, lr=0.1, restore="backup")
    optimizer.update_in_backward()
    before = values_of([weights.weight, other])
    (weights(torch.tensor([3])).to_dense() * other).sum().backward()
    weights.weight.grad = weights.weight.grad.to_dense()
    optimizer.first_step(zero_grad=True)
    with pytest.raises(TypeError, match="expected a dense"):
        (weights(torch.tensor([3])) * other).sum().backward()
    assert not optimizer.is_perturbed
    assert torch.equal(weights.weight, before[0])


# ---- what is refused -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (GSAM, TypeError, r"GSAM has no update_in_backward\(\): its coefficients"),
        (BSAM, TypeError, r"BSAM has no update_in_backward\(\): its coefficients"),
        (
            functools.partial(SAM, base_optimizer=RMSprop),
            TypeError,
            "base_optimizer is RMSprop, expected torch.optim.SGD, Adam or AdamW",
        ),
        (
            functools.partial(WSAM, max_grad_norm=2.0),
            ValueError,
            r"max_grad_norm is 2\.0, expected None",
        ),
        (functools.partial(ESAM, check_finite=True), ValueError, "check_finite is True, expected"),
    ],
    ids=["GSAM", "BSAM", "foreign", "clipping", "check_finite"],
)
def test_what_needs_all_second_gradients(
    make: Any, error: type[Exception], message: str, backend: str
) -> None:
    net = Net()
    optimizer = make(net.parameters(), lr=0.01, backend=backend)
    with pytest.raises(error, match=message):
        optimizer.update_in_backward()
    assert not any(param._post_accumulate_grad_hooks for param in net.parameters())
    if not isinstance(optimizer, ESAM):
        optimizer.step(closure_of(net, optimizer))
        assert any(param.grad is not None for param in net.parameters())


def test_micro_batches_are_refused() -> None:
    net = Net()
    optimizer = SAM(net.parameters(), SGD, lr=0.1)
    before = values_of(net.parameters())
    with optimizer.update_in_backward():
        message = r"list of closures while update_in_backward\(\) is active.*remove\(\)"
        with pytest.raises(RuntimeError, match=message):
            optimizer.step([lambda: net.losses().mean().backward()] * 2)
    assert all(map(torch.equal, before, net.parameters()))
    optimizer.step([lambda: net.losses().mean().backward()] * 2)
    assert not torch.equal(before[0], net.embedding.weight)


def test_it_is_refused_within_a_step() -> None:
    net = Net()
    optimizer = SAM(net.parameters(), SGD, lr=0.1)
    net.losses().mean().backward()
    optimizer.first_step(zero_grad=True)
    with pytest.raises(RuntimeError, match=r"update_in_backward\(\) was called while the weights"):
        optimizer.update_in_backward()
    optimizer.restore()
    optimizer.update_in_backward()


# ---- processes -------------------------------------------------------------------------------


def worker(rank: int, store: str, ranks: int, late: bool, results: Any) -> None:
    torch.set_num_threads(1)
    net, x, y = chain()
    optimizer = WSAM(net.parameters(), AdamW, lr=0.01)
    if late:
        optimizer.update_in_backward()
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    parallel = DistributedDataParallel(net)
    before = values_of(net.parameters())

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = chain_loss(parallel, x, y)
        loss.backward()
        return loss

    try:
        if not late:
            optimizer.update_in_backward()
        for _ in range(2):
            optimizer.step(closure)
        found: Any = [value.tolist() for value in values_of(net.parameters())]
    except RuntimeError as error:
        found = str(error)
        for value, param in zip(before, net.parameters(), strict=True):
            close(param.detach(), value, PERTURBED[torch.float32], "restored")
        assert not optimizer.is_perturbed
    results[rank] = found
    dist.destroy_process_group()


def run_workers(tmp_path: Path, ranks: int, *, late: bool = False) -> list[Any]:
    manager = torch.multiprocessing.get_context("spawn").Manager()
    results = manager.dict()
    torch.multiprocessing.spawn(
        worker, args=(str(tmp_path / "store"), ranks, late, results), nprocs=ranks
    )
    found = [results[rank] for rank in range(ranks)]
    manager.shutdown()
    return found


@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
def test_averages_over_processes_are_refused(late: bool, tmp_path: Path) -> None:
    """Also where the processes find each other after the handle was made."""
    for message in run_workers(tmp_path, 2, late=late):
        assert "in a process group of 2" in message
        assert "is not a DTensor" in message


def test_one_process_may_use_it(tmp_path: Path) -> None:
    (found,) = run_workers(tmp_path, 1)
    net, x, y = chain()
    optimizer = WSAM(net.parameters(), AdamW, lr=0.01)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = chain_loss(net, x, y)
        loss.backward()
        return loss

    for _ in range(2):
        optimizer.step(closure)
    torch.testing.assert_close([torch.tensor(v) for v in found], values_of(net.parameters()))
