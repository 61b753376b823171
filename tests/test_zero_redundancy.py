"""ZeroRedundancyOptimizer: as the base of a method it works, the other way round is refused."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from processes import result, results_of, run_on_ranks
from sharded_cases import own_share, problem, train
from tolerances import TRAJECTORY, close
from torch.nn.parallel import DistributedDataParallel

from wsam_fused import SAM, WSAM

RANKS = 2


def flat(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def share(whole: torch.Tensor) -> torch.Tensor:
    return own_share(whole, RANKS, torch.distributed.get_rank())


def zero(params: Any, optimizer_class: Any = torch.optim.AdamW, **options: Any) -> Any:
    from torch.distributed.optim import ZeroRedundancyOptimizer  # its import warns

    return ZeroRedundancyOptimizer(params, optimizer_class, lr=0.01, **options)


def as_base() -> tuple[torch.Tensor, torch.Tensor, int]:
    """Train, save, load into a twin and go on; return the weights of both, and how many steps."""
    model, x, y = problem()
    parallel = DistributedDataParallel(model)
    base = zero(model.parameters())
    optimizer = WSAM(model.parameters(), base, rho=0.1, gamma=0.8)
    train(parallel, optimizer, share(x), share(y), steps=2)

    base.consolidate_state_dict(to=0)
    saved = [optimizer.state_dict() if torch.distributed.get_rank() == 0 else None]
    torch.distributed.broadcast_object_list(saved)
    twin = DistributedDataParallel(copy.deepcopy(model))
    resumed = WSAM(twin.parameters(), zero(twin.parameters()), rho=0.5)
    resumed.load_state_dict(copy.deepcopy(saved[0]))  # torch takes its tensors as they are
    for each, its in ((parallel, optimizer), (twin, resumed)):
        train(each, its, share(x), share(y), steps=2)
    return flat(model), flat(twin), resumed.param_groups[0]["sam_step"]


def the_other_way_round() -> str:
    model, _, _ = problem()
    with pytest.raises(TypeError, match="the norm over all of them") as raised:
        zero(model.parameters(), SAM, base_optimizer=torch.optim.SGD)
    return str(raised.value)


def overlapping() -> str:
    model, _, _ = problem()
    with pytest.raises(ValueError, match="overlap_with_ddp is True, expected False") as raised:
        SAM(model.parameters(), zero(model.parameters(), overlap_with_ddp=True))
    return str(raised.value)


def unconsolidated() -> str:
    model, _, _ = problem()
    with pytest.raises(RuntimeError, match="has not been consolidated") as raised:
        SAM(model.parameters(), zero(model.parameters())).state_dict()
    return str(raised.value)


_CASES = (as_base, the_other_way_round, overlapping, unconsolidated)
CASES = {case.__name__: case for case in _CASES}


@pytest.fixture(scope="module")
def runs() -> list[dict[str, Any]]:
    return run_on_ranks(functools.partial(results_of, CASES), RANKS)


def test_as_base_optimizer_it_steps_like_one_process(runs: list[dict[str, Any]]) -> None:
    model, x, y = problem()
    optimizer = WSAM(model.parameters(), torch.optim.AdamW, rho=0.1, gamma=0.8, lr=0.01)
    train(model, optimizer, x, y, steps=4)
    for weights, resumed, steps in result(runs, "as_base"):
        close(weights, flat(model), TRAJECTORY, "trained")
        close(resumed, flat(model), TRAJECTORY, "resumed from a checkpoint")
        assert steps == 4


@pytest.mark.parametrize("case", ["the_other_way_round", "overlapping", "unconsolidated"])
def test_what_cannot_work_is_refused(case: str, runs: list[dict[str, Any]]) -> None:
    assert all(result(runs, case))
