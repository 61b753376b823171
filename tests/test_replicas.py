"""DistributedDataParallel: perturbations of all ranks and of each, against one process.

Two gloo processes run everything once; the tests look at what they found.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import replica_samples
import torch
from processes import run_ranks
from replica_events import (
    SMALL_BUCKETS,
    averaged,
    events_of_a_step,
    layouts,
    poisoned_step,
    refusal_of_a_static_graph,
    telemetry,
)
from replica_runs import (
    GLOBAL,
    LOCAL,
    METHODS,
    RANKS,
    UNEVEN,
    Case,
    apart_in_one,
    parallel_run,
    together_in_one,
    uneven_in_one,
    uneven_run,
)
from tolerances import ONE_STEP, REPLICAS, close

from wsam_fused import BSAM, ESAM, SAM, WSAM

EVENTS = [("sam", 1), ("wsam", 1), ("gsam", 1), ("bsam", 1), ("sam", 2), ("wsam", 2), ("gsam", 2)]
POISONED = [*((method, 1) for method in METHODS), ("sam", 2), ("wsam", 2), ("gsam-0", 2)]


def everything(rank: int) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for case in LOCAL:
        found["local", case] = parallel_run(rank, case, "local")
    for case in GLOBAL:
        found["global", case] = parallel_run(rank, case, "global")
    for case, scope in UNEVEN:
        found["uneven", case, scope] = uneven_run(rank, case, scope)
    for sample_case in replica_samples.CASES:
        found["samples", sample_case] = replica_samples.run(rank, *sample_case)
        found["poisoned", sample_case] = replica_samples.poisoned(rank, *sample_case)
    for method, parts in EVENTS:
        found["events", method, parts] = events_of_a_step(rank, method, parts, SMALL_BUCKETS)
    for method, parts in POISONED:
        found["poisoned", (method, parts)] = poisoned_step(rank, method, parts)
    for method in ("sam", "wsam", "gsam"):
        found["telemetry", method] = telemetry(rank, method)
    found["averages"] = averaged(rank)
    found["static"] = refusal_of_a_static_graph(rank)
    return found


@pytest.fixture(scope="module")
def ranks() -> list[dict[Any, Any]]:
    return run_ranks(everything, RANKS)


def label(case: Any) -> str:
    parts = case if isinstance(case, tuple) and not isinstance(case, Case) else (case,)
    flat = [x for part in parts for x in (part if isinstance(part, Case) else (part,))]
    return "-".join(str(x).removeprefix("torch.") for x in flat)


@pytest.mark.parametrize("case", LOCAL, ids=label)
def test_each_rank_perturbs_by_its_own_gradient(ranks: list[dict[Any, Any]], case: Case) -> None:
    """As if every rank's batch were a micro-batch, and the replicas stay equal bit by bit."""
    first, second = (found["local", case] for found in ranks)
    assert torch.equal(first, second)
    if case.dtype == torch.float64:
        close(first, apart_in_one(case), REPLICAS, label(case))


@pytest.mark.parametrize("case", GLOBAL, ids=label)
def test_all_ranks_perturb_by_the_mean_gradient(ranks: list[dict[Any, Any]], case: Case) -> None:
    expected = together_in_one(case)
    for found in ranks:
        close(found["global", case], expected, REPLICAS, label(case))


@pytest.mark.parametrize(("case", "scope"), UNEVEN, ids=label)
def test_parameters_that_only_some_ranks_use(
    ranks: list[dict[Any, Any]], case: Case, scope: str
) -> None:
    first, second = (found["uneven", case, scope] for found in ranks)
    assert torch.equal(first, second)
    close(first, uneven_in_one(case, scope), REPLICAS, label(case))


@pytest.mark.parametrize("case", replica_samples.CASES, ids=label)
def test_methods_that_look_at_samples(
    ranks: list[dict[Any, Any]], case: tuple[str, str, bool]
) -> None:
    """Ranks perturb the same tensors, and each selects among its own samples."""
    first, second = (found["samples", case] for found in ranks)
    assert torch.equal(first, second)
    close(first, replica_samples.in_one(*case[:2]), REPLICAS, label(case))


@pytest.mark.parametrize("method", ["sam", "wsam", "gsam", "bsam"])
def test_the_scopes_differ(ranks: list[dict[Any, Any]], method: str) -> None:
    """The comparisons above could tell them apart."""
    local = ranks[0]["local", Case(method, "sgdm")]
    assert (local - together_in_one(Case(method, "sgdm"))).abs().max() > 1e-4


CLOSURE, FLAG = ("closure", 0), ("optimizer", 1)
BUCKETS = [("optimizer", 45), ("optimizer", 64)]  # the second has 9, 18 and 2 elements, padded
MODEL = ("model", 74)


@pytest.mark.parametrize(
    ("method", "parts", "expected"),
    [
        ("sam", 1, [CLOSURE, FLAG, CLOSURE, MODEL]),
        ("wsam", 1, [CLOSURE, *BUCKETS, CLOSURE, MODEL]),
        ("gsam", 1, [CLOSURE, FLAG, CLOSURE, *BUCKETS]),
        ("bsam", 1, [CLOSURE, FLAG, CLOSURE, CLOSURE, *BUCKETS]),
        ("sam", 2, [*[CLOSURE] * 4, FLAG, *BUCKETS]),
        ("wsam", 2, [*[CLOSURE] * 4, *BUCKETS, *BUCKETS]),
        ("gsam", 2, [*[CLOSURE] * 4, FLAG, *BUCKETS]),
    ],
)
def test_what_ranks_tell_each_other(
    ranks: list[dict[Any, Any]], method: str, parts: int, expected: list[tuple[str, int]]
) -> None:
    """SAM averages once a step; what WSAM averages itself begins before its second evaluation."""
    for found in ranks:
        assert found["events", method, parts] == expected


def test_means_of_tensors_of_any_layout(ranks: list[dict[Any, Any]]) -> None:
    for first, second, offset in zip(
        ranks[0]["averages"], ranks[1]["averages"], (0, 2), strict=True
    ):
        values = [layouts(rank + offset) for rank in range(RANKS)]
        for mean, other, one, two in zip(first, second, *values, strict=True):
            assert torch.equal(mean, other)
            assert (mean.shape, mean.dtype) == (one.shape, one.dtype)
            expected = ((one.double() + two.double()) / 2).to(one.dtype)
            close(mean, expected, ONE_STEP[one.dtype], f"{one.dtype}, {tuple(one.shape)}")


@pytest.mark.parametrize("case", [*POISONED, *replica_samples.CASES], ids=label)
def test_a_gradient_that_is_not_finite_on_one_rank_skips_the_step_on_all(
    ranks: list[dict[Any, Any]], case: Any
) -> None:
    for found in ranks:
        weights, skipped = found["poisoned", case]
        assert skipped == 1
        assert torch.equal(weights[2], weights[1])
        assert not torch.equal(weights[1], weights[0])
        assert not torch.equal(weights[3], weights[2])
        assert torch.isfinite(weights[3]).all()
        for one, other in zip(weights, ranks[0]["poisoned", case][0], strict=True):
            assert torch.equal(one, other)


def test_the_norm_that_is_told_is_that_of_the_gradient_that_there_is(
    ranks: list[dict[Any, Any]],
) -> None:
    for found in ranks:
        sam, wsam, gsam = (found["telemetry", method] for method in ("sam", "wsam", "gsam"))
        assert sam["told"] == pytest.approx(sam["own"], rel=1e-12)
        assert wsam["told"] == pytest.approx(wsam["mean"], rel=1e-12)
        assert gsam["told"] is None
        assert abs(sam["own"] - sam["mean"]) > 1e-3


# ---- arguments -----------------------------------------------------------------------------------


def params() -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.ones(3))]


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="perturb_scope is 'both', expected one of 'global', 'lo"):
        SAM(params(), perturb_scope="both", lr=0.1)
    with pytest.raises(TypeError, match=r"process_group is int, expected a torch\.distributed"):
        SAM(params(), process_group=3, lr=0.1)
    with pytest.raises(ValueError, match="as_published is True and perturb_scope is 'local'"):
        BSAM(params(), perturb_scope="local", as_published=True, lr=0.1)


def test_a_static_graph_is_refused(ranks: list[dict[Any, Any]]) -> None:
    """Torch cannot run its first evaluation within no_sync()."""
    for found in ranks:
        assert "perturb_scope is 'local' and model has static_graph=True" in found["static"]


def test_a_scope_without_ranks_is_refused_before_the_weights_move() -> None:
    weights = params()
    optimizer = WSAM(weights, perturb_scope="local", lr=0.1)
    weights[0].grad = torch.ones(3)
    with pytest.raises(RuntimeError, match="perturb_scope is 'local', which averages over the"):
        optimizer.first_step()
    assert torch.equal(weights[0], torch.ones(3))
    assert not optimizer.is_perturbed


@pytest.mark.parametrize("method", [SAM, ESAM])
def test_closures_need_the_parallel_module(method: Any) -> None:
    model = torch.nn.Linear(2, 1)
    optimizer = method(model.parameters(), perturb_scope="local", model=model, lr=0.1)
    with pytest.raises(TypeError, match=r"model is Linear, expected model=<the DistributedDataP"):
        optimizer.step(lambda: model(torch.ones(1, 2)).sum())
    if method is SAM:
        with pytest.raises(TypeError, match="model is Linear"):
            optimizer.step([lambda: None])


def test_copies_keep_the_scope() -> None:
    copied = copy.deepcopy(WSAM(params(), perturb_scope="local", lr=0.1))
    assert copied._replicas.perturb_apart
    assert not copy.deepcopy(WSAM(params(), lr=0.1))._replicas.perturb_apart
