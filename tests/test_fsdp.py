"""What FSDP2 does besides sharding: gathered weights, mixed precision, failures half-way."""

from __future__ import annotations

import copy
import functools
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import BASES
from processes import result, results_of, run_on_ranks
from sharded_cases import METHODS, WAYS, own_share, problem, summary, train
from tolerances import ONE_STEP, TRAJECTORY, close
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from wsam_fused import ESAM, RWSAM, SAM, WSAM

RANKS = 2
Found = dict[str, Tensor]

# ---- per-sample methods --------------------------------------------------------------------------

# With these hyper-parameters the samples of a batch have the same part in a step wherever they are.
PER_SAMPLE: dict[str, Any] = {
    "esam": functools.partial(ESAM, rho=0.1, beta=0.5, gamma=1.0, seed=3),
    "rwsam": functools.partial(RWSAM, rho=0.1, lam=0.0, delta=0.1),
}


def per_sample(method: str, way: str | None) -> Found:
    model, x, y = problem()
    if way is not None:
        WAYS[way].shard(model)
        x, y = WAYS[way].share(x), WAYS[way].share(y)
    optimizer = PER_SAMPLE[method](model.parameters(), BASES["adamw"])

    def losses_fn(index: Tensor | None = None) -> Tensor:
        inputs, targets = (x, y) if index is None else (x[index], y[index])
        return (model(inputs) - targets).square().mean(1)

    for _ in range(3):
        optimizer.step(losses_fn)
    return summary(model, optimizer)


def per_sample_choices_differ_by_rank() -> list[float]:
    """Selection and weights look at a rank's own samples: it runs, and the ranks stay together."""
    losses = []
    for method in (ESAM, RWSAM):
        model, x, y = problem()
        WAYS["fsdp"].shard(model)
        x, y = WAYS["fsdp"].share(x), WAYS["fsdp"].share(y)
        optimizer = method(model.parameters(), BASES["adamw"], rho=0.1)

        def losses_fn(index: Tensor | None = None, model: Any = model) -> Tensor:
            inputs, targets = (x, y) if index is None else (x[index], y[index])  # noqa: B023
            return (model(inputs) - targets).square().mean(1)

        found = [optimizer.step(losses_fn) for _ in range(30)]
        mean = torch.stack([found[0], found[-1]])
        dist.all_reduce(mean)
        losses.append((mean[1] / mean[0]).item())
    return losses


# ---- mixed precision -----------------------------------------------------------------------------


def mixed_precision() -> Found:
    model, x, y = problem(torch.float32)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    fully_shard(model, mp_policy=policy, mesh=init_device_mesh("cpu", (RANKS,)))
    optimizer = METHODS["wsam"](model.parameters(), BASES["adamw"])
    train(model, optimizer, WAYS["fsdp"].share(x), WAYS["fsdp"].share(y))
    return summary(model, optimizer)


def mixed_precision_in_one_process() -> Found:
    """Gradients of bfloat16 copies, one for the share of each rank, averaged in float32."""
    model, x, y = problem(torch.float32)
    optimizer = METHODS["wsam"](model.parameters(), BASES["adamw"])

    def closure() -> Tensor:
        losses, grads = [], []
        for rank in range(RANKS):
            low = copy.deepcopy(model).bfloat16()
            output = low(own_share(x, RANKS, rank).bfloat16())
            losses.append(nn.functional.mse_loss(output, own_share(y, RANKS, rank)))
            losses[-1].backward()
            grads.append([param.grad.float() for param in low.parameters()])
        for param, *shares in zip(model.parameters(), *grads, strict=True):
            param.grad = sum(shares) / RANKS
        return torch.stack(losses).mean()

    for _ in range(4):
        optimizer.step(closure)
    return summary(model, optimizer)


# ---- failures ------------------------------------------------------------------------------------


class Interrupted(Exception):
    pass


def interrupted(where: str) -> Found:
    """The second evaluation of the second step raises on every rank; the step is made again."""
    model, x, y = problem()
    WAYS["fsdp"].shard(model)
    x, y = WAYS["fsdp"].share(x), WAYS["fsdp"].share(y)
    optimizer = METHODS["wsam"](model.parameters(), BASES["adamw"])
    train(model, optimizer, x, y, steps=1)
    before = [param._local_tensor.clone() for param in model.parameters()]
    calls = []

    def fail(*_: Any) -> None:
        raise Interrupted

    def closure() -> Tensor:
        calls.append(0)
        optimizer.zero_grad()
        second = len(calls) == 2
        hook = model.last.register_forward_hook(fail) if second and where == "forward" else None
        try:
            output = model(x)
        finally:
            if hook is not None:
                hook.remove()
        if second and where == "loss":
            fail()
        if second and where == "backward":
            output.register_hook(fail)
        loss = nn.functional.mse_loss(output, y)
        loss.backward()
        assert not second, "it did not fail"
        return loss

    with pytest.raises(Interrupted):
        optimizer.step(closure)
    assert not optimizer.is_perturbed
    after = [param._local_tensor for param in model.parameters()]
    for restored, w in zip(after, before, strict=True):
        close(restored, w, ONE_STEP[torch.float64], "restored")
    optimizer.zero_grad()
    train(model, optimizer, x, y, steps=1)
    return summary(model, optimizer)


def one_rank_fails() -> tuple[bool, float, str]:
    """One rank raises in the second closure; the other one waits for it until the timeout."""
    model, x, y = problem()
    WAYS["fsdp"].shard(model)
    optimizer = METHODS["wsam-backup"](model.parameters(), BASES["adamw"])
    train(model, optimizer, x, y, steps=1)
    before = [param._local_tensor.clone() for param in model.parameters()]
    calls = []

    def closure() -> Tensor:
        calls.append(0)
        optimizer.zero_grad()
        if len(calls) == 2 and dist.get_rank() == 1:
            raise Interrupted
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        return loss

    begin = time.monotonic()
    with pytest.raises((Interrupted, RuntimeError)) as raised:
        optimizer.step(closure)
    assert not optimizer.is_perturbed
    after = [param._local_tensor for param in model.parameters()]
    return all(map(torch.equal, after, before)), time.monotonic() - begin, raised.typename


# ---- other ---------------------------------------------------------------------------------------


def frozen(way: str | None) -> Found:
    """A weight that is frozen for two steps and then trained."""
    model, x, y = problem()
    weight_of = model.first.requires_grad_(False)
    if way is not None:
        WAYS[way].shard(model)
        x, y = WAYS[way].share(x), WAYS[way].share(y)
    optimizer = METHODS["gsam"](model.parameters(), BASES["sgdm"])
    train(model, optimizer, x, y, steps=2)
    weight_of.requires_grad_(True)
    train(model, optimizer, x, y, steps=2)
    return summary(model, optimizer)


def batch_norm() -> list[int]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double()
    _, x, y = problem()
    fully_shard(model, mesh=init_device_mesh("cpu", (RANKS,)))
    counts = []
    for options in ({"model": model}, {}):
        optimizer = SAM(model.parameters(), BASES["adamw"], rho=0.1, **options)
        train(model, optimizer, WAYS["fsdp"].share(x), WAYS["fsdp"].share(y), steps=3)
        counts.append(int(model[1].num_batches_tracked))
    return counts


def calls() -> Found:
    """The two-call form, with gradients added up over two backwards, gathered weights kept."""
    model, x, y = problem()
    WAYS["fsdp-keeps-gathered"].shard(model)
    x, y = WAYS["fsdp"].share(x, 2), WAYS["fsdp"].share(y, 2)
    optimizer = WSAM(model.parameters(), BASES["adamw"], rho=0.1, gamma=0.8)
    for _ in range(4):
        for call in (optimizer.first_step, optimizer.second_step):
            for part in zip(x.chunk(2), y.chunk(2), strict=True):
                (nn.functional.mse_loss(model(part[0]), part[1]) / 2).backward()
            call(zero_grad=True)
    return summary(model, optimizer)


@functools.cache
def in_one_process(method: str, base: str, steps: int) -> Found:
    model, x, y = problem()
    optimizer = METHODS[method](model.parameters(), BASES[base])
    train(model, optimizer, x, y, steps=steps)
    return summary(model, optimizer)


PLACES = ("forward", "loss", "backward")
CASES: dict[str, Any] = {
    **{name: functools.partial(per_sample, name, "fsdp") for name in PER_SAMPLE},
    **{place: functools.partial(interrupted, place) for place in PLACES},
    "frozen": functools.partial(frozen, "fsdp"),
    **{
        case.__name__: case
        for case in (per_sample_choices_differ_by_rank, mixed_precision, batch_norm, calls)
    },
}


def worker() -> dict[str, Any]:
    return results_of(CASES)


def failing_worker() -> dict[str, Any]:
    return results_of({"one_rank_fails": one_rank_fails})


@pytest.fixture(scope="module")
def runs() -> list[dict[str, Any]]:
    return run_on_ranks(worker, RANKS)


def compare(found: list[Found], expected: Found, tolerance: Any = TRAJECTORY) -> None:
    for rank, values in enumerate(found):
        assert values.keys() == expected.keys()
        for name, value in values.items():
            close(value, expected[name], tolerance, f"{name} on rank {rank}")


@pytest.mark.parametrize("method", PER_SAMPLE)
def test_per_sample_methods_equal_one_process(method: str, runs: list[Any]) -> None:
    """RWSAM's probe leaves no gathered weights behind; ESAM freezes the same tensors everywhere."""
    compare(result(runs, method), per_sample(method, None))


def test_per_sample_methods_look_at_the_samples_of_a_rank(runs: list[Any]) -> None:
    first, second = result(runs, "per_sample_choices_differ_by_rank")
    assert first == second
    assert all(rest < 0.9 for rest in first), "the loss has not fallen"


def test_mixed_precision_equals_low_copies_of_the_weights(runs: list[Any]) -> None:
    compare(
        result(runs, "mixed_precision"), mixed_precision_in_one_process(), ONE_STEP[torch.float32]
    )


@pytest.mark.parametrize("place", PLACES)
def test_a_closure_that_raises_leaves_nothing_perturbed(place: str, runs: list[Any]) -> None:
    """Neither the parts of the weights nor what the modules have gathered of them."""
    compare(result(runs, place), in_one_process("wsam", "adamw", 2))


def test_a_rank_that_raises_leaves_no_other_rank_perturbed_or_waiting() -> None:
    found = run_on_ranks(failing_worker, RANKS, timeout=60, group_timeout=4, ends_together=False)
    (_, waited, _), (_, _, raised) = result(found, "one_rank_fails")
    assert all(restored for restored, _, _ in result(found, "one_rank_fails"))
    assert raised == "Interrupted"
    assert waited < 30


def test_frozen_parameters_equal_one_process(runs: list[Any]) -> None:
    compare(result(runs, "frozen"), frozen(None))


def test_batch_norm_statistics_are_those_of_the_weights(runs: list[Any]) -> None:
    assert result(runs, "batch_norm") == [[3, 3 + 6]] * RANKS


def test_call_by_call_with_gathered_weights_that_stay(runs: list[Any]) -> None:
    compare(result(runs, "calls"), in_one_process("wsam", "adamw", 4))
