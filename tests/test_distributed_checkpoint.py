"""torch.distributed.checkpoint: training goes on from a checkpoint that other ranks have saved."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from processes import result, results_of, run_on_ranks
from sharded_cases import ALL_BASES, METHODS, WAYS, full, problem, summary, train
from tolerances import TRAJECTORY, close
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from wsam_fused import RWSAM

STEPS = 2  # in each of three process groups
WORLDS = (4, 2, 4)
# Ways of the process groups of 4 and of 2 ranks, method, base, whether the names are flattened.
CASES = [
    ("fsdp", "fsdp", "wsam", "adamw", False),
    ("fsdp", "fsdp", "bsam", "amsgrad", True),
    ("fsdp", "fsdp", "sam", "sgdm", True),
    ("fsdp", "fsdp", "wsam", "sgdm-dampened", False),
    ("fsdp", "fsdp", "sam", "sgd", False),
    ("fsdp", "fsdp", "gsam", "rmsprop", False),
    ("tp-and-fsdp", "tp", "gsam", "adamw", False),
    ("hsdp", "fsdp", "wsam-clip", "adamw", True),
]


class Run:
    """A model and its optimizer, with other hyper-parameters than the checkpoint's."""

    def __init__(self, way: str, method: str, base: str, **options: Any) -> None:
        self.model, x, y = problem()
        WAYS[way].shard(self.model)
        self.x, self.y = WAYS[way].share(x), WAYS[way].share(y)
        self.optimizer = METHODS[method](self.model.parameters(), ALL_BASES[base], **options)

    def train(self) -> None:
        train(self.model, self.optimizer, self.x, self.y, steps=STEPS)

    def state(self, **options: Any) -> dict[str, Any]:
        options = StateDictOptions(**options)
        return {
            "model": get_model_state_dict(self.model),
            "optimizer": get_optimizer_state_dict(self.model, self.optimizer, options=options),
        }

    def load(self, folder: str, **options: Any) -> None:
        state = self.state(**options)
        dcp.load(state, checkpoint_id=folder)
        set_model_state_dict(self.model, state["model"])
        options = StateDictOptions(**options)
        set_optimizer_state_dict(self.model, self.optimizer, state["optimizer"], options=options)


def go_on(
    folder: str, leg: int, way4: str, way2: str, method: str, base: str, flat: bool
) -> dict[str, Any]:
    """Load what the process group before has saved, train and save."""
    run = Run(way4 if WORLDS[leg] == 4 else way2, method, base, **({"rho": 9.0} if leg else {}))
    options = {"flatten_optimizer_state_dict": flat}
    place = f"{folder}/{way4}-{method}-{base}-"
    if leg:
        run.load(f"{place}{leg - 1}", **options)
    run.train()
    dcp.save(run.state(**options), checkpoint_id=f"{place}{leg}")
    return summary(run.model, run.optimizer)


def creates_state(method: str, base: str) -> dict[str, Any]:
    """Ask for the state before the first step, which must not change the run."""
    run = Run("fsdp", method, base)
    before = [full(param) for param in run.model.parameters()]
    asked = run.state()["optimizer"]["state"]
    assert all(torch.equal(full(p), b) for p, b in zip(run.model.parameters(), before, strict=True))
    assert run.optimizer.param_groups[0]["sam_step"] == 0
    assert run.optimizer.param_groups[0]["lr"] > 0
    keys = {name: sorted(entry) for name, entry in asked.items()}
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, keys)
    assert all(each == keys for each in everywhere)
    run.train()
    found = summary(run.model, run.optimizer)
    return {**found, "keys": keys}


def whole_on_one_rank() -> dict[str, Any]:
    """Collect the state on rank 0 and hand it out again."""
    run = Run("fsdp", "wsam", "adamw")
    run.train()
    asked = {"full_state_dict": True, "cpu_offload": True}
    state = get_optimizer_state_dict(run.model, run.optimizer, options=StateDictOptions(**asked))
    assert bool(state) == (dist.get_rank() == 0)
    twin = Run("fsdp", "wsam", "adamw", rho=9.0)
    set_model_state_dict(twin.model, get_model_state_dict(run.model))
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_optimizer_state_dict(twin.model, twin.optimizer, state, options=options)
    twin.train()
    return summary(twin.model, twin.optimizer)


def plain_state_dict() -> dict[str, Any]:
    """Load a checkpoint of one process, whole on every rank, with load_state_dict()."""
    model, x, y = problem()
    optimizer = METHODS["wsam"](model.parameters(), ALL_BASES["adamw"])
    train(model, optimizer, x, y, steps=STEPS)
    run = Run("fsdp", "wsam", "adamw", rho=9.0)
    set_model_state_dict(run.model, model.state_dict(), options=_WHOLE)
    run.optimizer.load_state_dict(optimizer.state_dict())
    run.train()
    return summary(run.model, run.optimizer)


def refused() -> str:
    """A checkpoint of another base; nothing is written."""
    saved = Run("fsdp", "wsam", "sgdm")
    saved.train()
    run = Run("fsdp", "wsam", "adamw")
    run.train()
    before = summary(run.model, run.optimizer)
    with pytest.raises(ValueError, match="another base optimizer than AdamW") as raised:
        run.optimizer.load_state_dict(saved.optimizer.state_dict())
    after = summary(run.model, run.optimizer)
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    return str(raised.value)


def of_another_method(folder: str) -> str:
    """A checkpoint of WSAM for SAM, through the file system."""
    saved = Run("fsdp", "wsam", "adamw")
    saved.train()
    dcp.save(saved.state(), checkpoint_id=f"{folder}/other-method")
    with pytest.raises(
        ValueError, match="the checkpoint is of WSAM, expected one of SAM"
    ) as raised:
        Run("fsdp", "sam", "adamw").load(f"{folder}/other-method")
    return str(raised.value)


def per_sample_method_creates_state() -> int:
    model, _, _ = problem()
    WAYS["fsdp"].shard(model)
    optimizer = RWSAM(model.parameters(), torch.optim.AdamW)
    return len(get_optimizer_state_dict(model, optimizer)["state"])


_WHOLE = StateDictOptions(full_state_dict=True)
CREATED = [("wsam", "adamw"), ("wsam", "sgdm"), ("sam", "sgd"), ("gsam", "rmsprop")]
OTHERS = (whole_on_one_rank, plain_state_dict, refused, per_sample_method_creates_state)


def worker(folder: str, leg: int) -> dict[str, Any]:
    cases: dict[str, Any] = {
        str(case): functools.partial(go_on, folder, leg, *case) for case in CASES
    }
    if leg == 0:
        cases.update({str(case): functools.partial(creates_state, *case) for case in CREATED})
        cases.update({case.__name__: case for case in OTHERS})
        cases["of_another_method"] = functools.partial(of_another_method, folder)
    return results_of(cases)


@pytest.fixture(scope="module")
def legs(tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("checkpoints")
    return [run_on_ranks(worker, world, str(folder), leg) for leg, world in enumerate(WORLDS)]


@functools.cache
def expected(method: str, base: str, steps: int) -> dict[str, Any]:
    model, x, y = problem()
    optimizer = METHODS[method](model.parameters(), ALL_BASES[base])
    train(model, optimizer, x, y, steps=steps)
    return summary(model, optimizer)


def compare(found: dict[str, Any], whole: dict[str, Any], what: str) -> None:
    assert found.keys() == whole.keys()
    for name, value in found.items():
        close(value, whole[name], TRAJECTORY, f"{name} {what}")


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_training_goes_on_with_other_ranks(case: tuple[Any, ...], legs: list[Any]) -> None:
    for leg, runs in enumerate(legs):
        for rank, found in enumerate(result(runs, str(case))):
            whole = expected(*case[2:4], steps=STEPS * (leg + 1))
            compare(found, whole, f"on rank {rank} of {WORLDS[leg]}")


@pytest.mark.parametrize("case", CREATED, ids="-".join)
def test_the_state_can_be_asked_for_before_the_first_step(case: Any, legs: list[Any]) -> None:
    for found in result(legs[0], str(case)):
        keys = found.pop("keys")
        stateless = case[1] == "sgd"
        assert stateless == (not keys)
        compare(_without_step(found, case), _without_step(expected(*case, STEPS), case), "")


def _without_step(found: dict[str, Any], case: tuple[str, str]) -> dict[str, Any]:
    """A foreign optimizer counts the step that created its state."""
    foreign = case[1] == "rmsprop"
    return {k: v for k, v in found.items() if not (foreign and k.endswith(", step"))}


@pytest.mark.parametrize("case", ["whole_on_one_rank", "plain_state_dict"])
def test_a_whole_state_is_sharded_when_it_is_loaded(case: str, legs: list[Any]) -> None:
    for found in result(legs[0], case):
        compare(found, expected("wsam", "adamw", 2 * STEPS), case)


@pytest.mark.parametrize("case", ["refused", "of_another_method"])
def test_a_checkpoint_of_another_optimizer_is_refused(case: str, legs: list[Any]) -> None:
    assert all(result(legs[0], case))


def test_per_sample_methods_create_their_state_too(legs: list[Any]) -> None:
    count = len(list(problem()[0].parameters()))
    assert result(legs[0], "per_sample_method_creates_state") == [count] * 4
