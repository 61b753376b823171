"""Sharded parameters: gradients that are missing, placed otherwise or not finite; wrong lists."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import BASES
from processes import result, results_of, run_on_ranks
from tolerances import ONE_STEP, TRAJECTORY, close
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from wsam_fused import BSAM, GSAM, SAM, WSAM

RANKS = 2
SHAPES = ((5, 3), (4,), (1, 2))  # over two ranks: 3 and 2 rows, 2 and 2, 1 and none
SHARDED, REPLICATED = [Shard(0)], [Replicate()]


def values(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]


def mesh() -> Any:
    return init_device_mesh("cpu", (RANKS,))


def sharded(placements: Any = SHARDED, seed: int = 0) -> list[nn.Parameter]:
    return [nn.Parameter(distribute_tensor(value, mesh(), placements)) for value in values(seed)]


def give(params: list[nn.Parameter], seed: int, missing: Any = ()) -> None:
    """Give gradients; ``missing`` has pairs of a rank and a parameter."""
    for i, (param, value) in enumerate(zip(params, values(seed), strict=True)):
        whole = distribute_tensor(value, param.device_mesh, param.placements)
        param.grad = None if (dist.get_rank(), i) in missing else whole


def step(optimizer: Any, give_gradients: Callable[[int], None], steps: int = 2) -> None:
    for number in range(steps):
        for evaluation in range(optimizer.evaluations):
            give_gradients(10 + 3 * number + evaluation)
            calls = (optimizer.first_step, optimizer.second_step, optimizer.third_step)
            calls[evaluation](zero_grad=True)


def locals_of(params: list[nn.Parameter]) -> list[Tensor]:
    return [param._local_tensor.detach().clone() for param in params]


# ---- missing gradients ---------------------------------------------------------------------------

MISSING = {
    "one-on-one-rank": [(1, 0)],
    "all-on-one-rank": [(0, 0), (0, 1), (0, 2)],
    "one-everywhere": [(0, 1), (1, 1)],
}
EVALUATED = {"sam": SAM, "wsam": WSAM, "gsam": GSAM, "bsam": BSAM}


def with_missing(method: str, base: str, missing: str) -> list[Tensor]:
    params = sharded()
    optimizer = EVALUATED[method](params, BASES[base], rho=0.2, max_grad_norm=0.5)
    step(optimizer, lambda seed: give(params, seed, MISSING[missing]))
    assert all(list(optimizer.state[p]) == list(optimizer.state[params[0]]) for p in params)
    return [*locals_of(params), optimizer.last.grad_norm]


def parts_as_parameters(method: str, base: str, missing: str) -> list[list[Tensor]]:
    """The same with every rank's part as a parameter of one process."""
    parts = [[nn.Parameter(part) for part in _parts(value)] for value in values(0)]
    optimizer = EVALUATED[method](
        [part for both in parts for part in both], BASES[base], rho=0.2, max_grad_norm=0.5
    )

    def give_parts(seed: int) -> None:
        for i, (both, value) in enumerate(zip(parts, values(seed), strict=True)):
            for rank, (part, grad) in enumerate(zip(both, _parts(value), strict=True)):
                part.grad = None if (rank, i) in MISSING[missing] else grad

    step(optimizer, give_parts)
    norm = optimizer.last.grad_norm
    return [[*(both[rank].detach() for both in parts), norm] for rank in range(RANKS)]


def _parts(value: Tensor) -> list[Tensor]:
    parts = [part.clone() for part in value.chunk(RANKS)]
    return parts + [value[:0].clone()] * (RANKS - len(parts))


def no_gradient_anywhere() -> str:
    params = sharded()
    optimizer = SAM(params, BASES["adamw"], every=2)  # a plain step as well
    before = locals_of(params)
    for number in range(2):
        with pytest.raises(RuntimeError, match="none of the 3 parameters has a grad") as raised:
            optimizer.first_step(zero_grad=True)
        assert not optimizer.is_perturbed
        assert all(map(torch.equal, locals_of(params), before))
        if number == 0:
            give(params, 1)
            optimizer.first_step(zero_grad=True)  # and then the other kind of step
            before = locals_of(params)
    return str(raised.value)


# ---- unusual gradients ---------------------------------------------------------------------------


def not_finite_on_one_rank() -> list[Any]:
    params = sharded()
    optimizer = SAM(params, BASES["adamw"], rho=0.2)
    before = locals_of(params)

    def give_infinite(seed: int) -> None:
        give(params, seed)
        if dist.get_rank() == 1:
            params[0].grad._local_tensor[0, 0] = float("inf")

    step(optimizer, give_infinite, steps=1)
    same = all(map(torch.equal, locals_of(params), before))
    return [same, optimizer.skipped_steps.item()]


def partial_gradients() -> list[Tensor]:
    """Every rank has a share of each gradient, as of a replicated weight of a split layer."""
    params = sharded(REPLICATED)
    optimizer = WSAM(params, BASES["adamw"], rho=0.2)

    def give_shares(seed: int) -> None:
        for param, value in zip(params, values(seed), strict=True):
            share = value * (0.25 if dist.get_rank() == 0 else 0.75)
            param.grad = DTensor.from_local(share, param.device_mesh, [Partial()])

    step(optimizer, give_shares)
    return [*locals_of(params), optimizer.last.grad_norm]


def whole_in_one_process(method: Any, base: str) -> list[Tensor]:
    params = [nn.Parameter(value) for value in values(0)]
    optimizer = method(params, BASES[base], rho=0.2)

    def give_whole(seed: int) -> None:
        for param, value in zip(params, values(seed), strict=True):
            param.grad = value

    step(optimizer, give_whole)
    return [*(param.detach() for param in params), optimizer.last.grad_norm]


def memory_is_exchanged() -> list[Tensor]:
    """Between steps and while the weights are perturbed, as FSDP2 may."""
    params = sharded()
    optimizer = WSAM(params, BASES["adamw"], rho=0.2)

    def give_and_exchange(seed: int) -> None:
        for param in params:
            param._local_tensor = param._local_tensor.clone()
        give(params, seed)

    step(optimizer, give_and_exchange)
    return [*(param.detach().full_tensor() for param in params), optimizer.last.grad_norm]


def gradients_are_kept() -> list[Tensor]:
    params = sharded()
    optimizer = WSAM(params, BASES["adamw"], rho=0.2)
    for number in range(2):
        for evaluation, call in enumerate((optimizer.first_step, optimizer.second_step)):
            give(params, 10 + 3 * number + evaluation)
            kept = [param.grad for param in params]
            call()
            assert all(param.grad is grad for param, grad in zip(params, kept, strict=True))
    return [*(param.detach().full_tensor() for param in params), optimizer.last.grad_norm]


# ---- noise ---------------------------------------------------------------------------------------


def noise(placements: Any) -> list[Tensor]:
    params = [nn.Parameter(distribute_tensor(torch.zeros(128), mesh(), placements))]
    optimizer = SAM(params, BASES["sgd"])
    engine = optimizer._begin_without_gradients()
    engine.lists.set_rows([row._replace(delta=1.0) for row in engine.lists.primary.rows])
    engine.probe(7)
    return locals_of(params)


# ---- wrong lists ---------------------------------------------------------------------------------


def mixed() -> str:
    params = [*sharded(), nn.Parameter(torch.zeros(3, 2))]
    with pytest.raises(ValueError, match="3 DTensors and 1 plain tensors") as raised:
        SAM(params, BASES["sgd"])
    assert "parameter 3 of group 0, of shape (3, 2)" in str(raised.value)
    with pytest.raises(ValueError, match="plain tensors \\('bias'\\)"):
        SAM([("weight", params[0]), ("bias", params[3])], BASES["sgd"])
    optimizer = SAM(params[:3], BASES["sgd"])
    with pytest.raises(ValueError, match="plain tensors"):
        optimizer.add_param_group({"params": params[3:]})
    assert len(optimizer.param_groups) == 1
    return str(raised.value)


def other_ranks() -> str:
    alone = dist.device_mesh.DeviceMesh("cpu", [dist.get_rank()], _init_backend=False)
    single = nn.Parameter(DTensor.from_local(torch.zeros(2), alone, [Replicate()]))
    with pytest.raises(ValueError, match="DTensors of different meshes") as raised:
        SAM([*sharded(), single], BASES["sgd"])
    return str(raised.value)


def a_sum_as_parameter() -> str:
    share = nn.Parameter(DTensor.from_local(torch.zeros(2), mesh(), [Partial()]))
    with pytest.raises(TypeError, match="expected Shard or Replicate") as raised:
        SAM([share], BASES["sgd"])
    return str(raised.value)


class Odd(Tensor):
    """A tensor that may keep its values anywhere."""


def parts_of_another_class() -> str:
    params = sharded()
    params[1]._local_tensor = params[1]._local_tensor.as_subclass(Odd)
    with pytest.raises(TypeError, match="a DTensor of Odd: parameter 1 of") as raised:
        SAM(params, BASES["sgd"])
    return str(raised.value)


def fsdp1() -> str:
    from torch.distributed.fsdp import FullyShardedDataParallel

    for keeps_params in (False, True):
        model = FullyShardedDataParallel(
            nn.Linear(3, 2), use_orig_params=keeps_params, device_id=torch.device("cpu")
        )
        with pytest.raises(TypeError, match="FullyShardedDataParallel \\(FSDP1\\)") as raised:
            SAM(model.parameters(), BASES["sgd"])
    return str(raised.value)


# ---- collectives ---------------------------------------------------------------------------------


def collectives(method: str, placements: Any, shape: tuple[int, ...]) -> int:
    """Count the sums over ranks in a step with gradients on one rank only, if it is split."""
    on = init_device_mesh("cpu", shape)
    params = [
        nn.Parameter(distribute_tensor(value, on, each))
        for each in placements
        for value in values(0)
    ]
    optimizer = EVALUATED[method](params, BASES["adamw"], rho=0.2)
    counted = []
    all_reduce = dist.all_reduce

    def counting(*args: Any, **kwargs: Any) -> Any:
        counted.append(0)
        return all_reduce(*args, **kwargs)

    def give_on_one_rank(seed: int) -> None:
        if dist.get_rank() == 0 or placements == [REPLICATED]:
            for param in params:
                param.grad = torch.ones_like(param)

    dist.all_reduce = counting
    try:
        step(optimizer, give_on_one_rank, steps=1)
    finally:
        dist.all_reduce = all_reduce
    return len(counted)


_REFUSED = (mixed, other_ranks, a_sum_as_parameter, parts_of_another_class, fsdp1)
WRONG = {case.__name__: case for case in (no_gradient_anywhere, *_REFUSED)}
WHOLE = {
    case.__name__: case for case in (partial_gradients, memory_is_exchanged, gradients_are_kept)
}
LACKING = [
    *[(method, "sgdm", missing) for method in EVALUATED for missing in MISSING],
    ("wsam", "adamw", "all-on-one-rank"),
]
# Sums for the norm of g1, and for all norms where the method needs them: one for each mesh
# dimension that splits anything.
_BOTH = [[Shard(0), Replicate()], [Replicate(), Shard(0)], [Shard(0), Shard(0)]]
COUNTS: dict[str, tuple[Any, int]] = {
    "sam": (("sam", [SHARDED], (RANKS,)), 1),
    "sam over both dimensions": (("sam", _BOTH, (RANKS, 1)), 2),
    "gsam": (("gsam", [SHARDED, REPLICATED], (RANKS,)), 2),
    "bsam": (("bsam", [SHARDED], (RANKS,)), 3),
    "replicas": (("gsam", [REPLICATED], (RANKS,)), 0),
}
CASES: dict[str, Any] = {
    **{f"count of {n}": functools.partial(collectives, *case) for n, (case, _) in COUNTS.items()},
    **WRONG,
    **WHOLE,
    **{str(case): functools.partial(with_missing, *case) for case in LACKING},
    "not_finite_on_one_rank": not_finite_on_one_rank,
    "noise of parts": functools.partial(noise, SHARDED),
    "noise of replicas": functools.partial(noise, REPLICATED),
}


@pytest.fixture(scope="module")
def runs() -> list[dict[str, Any]]:
    return run_on_ranks(worker, RANKS)


def worker() -> dict[str, Any]:
    return results_of(CASES)


@pytest.mark.parametrize("case", LACKING, ids="-".join)
def test_a_missing_gradient_is_missing_for_its_part(
    case: tuple[str, str, str], runs: list[dict[str, Any]]
) -> None:
    pairs = zip(result(runs, str(case)), parts_as_parameters(*case), strict=True)
    for rank, (found, expected) in enumerate(pairs):
        for i, (part, whole) in enumerate(zip(found, expected, strict=True)):
            close(part, whole, ONE_STEP[torch.float64], f"tensor {i} on rank {rank}")


@pytest.mark.parametrize("case", WHOLE)
def test_unusual_gradients_equal_usual_ones(case: str, runs: list[dict[str, Any]]) -> None:
    for found in result(runs, case):
        expected = whole_in_one_process(WSAM, "adamw")
        for i, (value, whole) in enumerate(zip(found, expected, strict=True)):
            close(value, whole, TRAJECTORY, f"tensor {i}")


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_an_error_on_every_rank(case: str, runs: list[dict[str, Any]]) -> None:
    assert all(result(runs, case))


@pytest.mark.parametrize("name", COUNTS)
def test_every_mesh_dimension_takes_one_collective(name: str, runs: list[dict[str, Any]]) -> None:
    assert result(runs, f"count of {name}") == [COUNTS[name][1]] * RANKS


def test_a_norm_that_is_not_finite_skips_the_step_on_every_rank(
    runs: list[dict[str, Any]],
) -> None:
    assert result(runs, "not_finite_on_one_rank") == [[True, 1.0]] * RANKS


def test_parts_have_noise_of_their_own_and_replicas_the_same(runs: list[dict[str, Any]]) -> None:
    (first,), (second,) = result(runs, "noise of parts")
    assert first.shape == second.shape == (64,)
    assert set(first.tolist()) == set(second.tolist()) == {-1.0, 1.0}
    assert not torch.equal(first, second)
    (first,), (second,) = result(runs, "noise of replicas")
    assert torch.equal(first, second)
