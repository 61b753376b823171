"""Many steps, in seconds: nothing grows, and weights drift as docs/reliability says.

``python -m benchmarks.reliability long`` makes the same over 10^6 steps.
"""

from __future__ import annotations

import copy
import functools
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import parameters, step
from processes import run_apart
from torch import Tensor, nn
from torch.optim import SGD, AdamW, RMSprop
from torch.optim.lr_scheduler import CosineAnnealingLR

from benchmarks.common import RESULTS, ROOT, read_rows
from benchmarks.readme import filled
from benchmarks.reliability import __main__ as command
from benchmarks.reliability import long
from benchmarks.reliability.drift import MAGNITUDES, trainings, walk
from benchmarks.reliability.growth import (
    AT_ONCE,
    PAGES,
    PAGES_AT_ONCE,
    TRAININGS,
    Reading,
    growth,
    readings,
)
from benchmarks.reliability.long_tables import tables
from wsam_fused import ESAM, GSAM, SAM, WSAM

STEPS = 3000


class Uses:
    """Steps of an optimizer that are used in some way, with a closure that has a backward."""

    def __init__(self, make: Callable[[Any], Any], use: Callable[[Uses], object]) -> None:
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
        self.data = torch.randn(6, 3)
        self.optimizer = make(self.net.parameters())
        self._use = use

    def closure(self, index: Any = None) -> Tensor:
        self.optimizer.zero_grad()
        loss: Tensor = self.net(self.data).square().mean()
        loss.backward()
        return loss

    def losses(self, index: Any = None) -> Tensor:
        data = self.data if index is None else self.data[index]
        losses: Tensor = self.net(data).square().mean(1)
        return losses

    def step(self) -> None:
        self._use(self)


def _plain(use: Uses) -> None:
    use.optimizer.step(use.closure)


def _fails(use: Uses) -> None:
    """Half of the steps fail in the second evaluation."""

    def closure() -> Tensor:
        loss = use.closure()
        if use.optimizer.is_perturbed:
            raise FloatingPointError("as a user's code may raise")
        return loss

    with pytest.raises(FloatingPointError):
        use.optimizer.step(closure)
    _plain(use)


def _is_called_wrongly(use: Uses) -> None:
    _plain(use)
    with pytest.raises(RuntimeError):
        use.optimizer.second_step()


def _micro_batches(use: Uses) -> None:
    def part() -> Tensor:
        loss: Tensor = use.net(use.data).square().mean()
        loss.backward()
        return loss

    use.optimizer.step([part, part])


def _saves_and_loads(use: Uses) -> None:
    _plain(use)
    file = io.BytesIO()
    torch.save(use.optimizer.state_dict(), file)
    file.seek(0)
    use.optimizer.load_state_dict(torch.load(file))


def _is_copied(use: Uses) -> None:
    _plain(use)
    copy.deepcopy(use.optimizer)


def _updates_in_backward(use: Uses) -> None:
    with use.optimizer.update_in_backward():
        _plain(use)


def _is_scheduled(use: Uses) -> None:
    scheduler = CosineAnnealingLR(use.optimizer, 10)
    _plain(use)
    scheduler.step()


def _looks(use: Uses) -> None:
    _plain(use)
    assert use.optimizer.last.sharpness is not None
    assert use.optimizer.skipped_steps == 0


# How an optimizer is made, and how it is used.
USES: dict[str, tuple[Callable[[Any], Any], Callable[[Uses], object]]] = {
    "fails": (functools.partial(WSAM, base_optimizer=AdamW, lr=1e-3), _fails),
    "wrong-call": (functools.partial(SAM, base_optimizer=SGD, lr=1e-3), _is_called_wrongly),
    "micro-batches": (functools.partial(SAM, base_optimizer=AdamW, lr=1e-3), _micro_batches),
    "saves": (functools.partial(WSAM, base_optimizer=AdamW, lr=1e-3), _saves_and_loads),
    "copied": (functools.partial(WSAM, base_optimizer=AdamW, lr=1e-3), _is_copied),
    "in-backward": (functools.partial(WSAM, base_optimizer=AdamW, lr=1e-3), _updates_in_backward),
    "clips": (functools.partial(GSAM, base_optimizer=AdamW, lr=1e-3, max_grad_norm=0.1), _looks),
    "foreign": (functools.partial(WSAM, base_optimizer=RMSprop, lr=1e-3, every=2), _plain),
    "samples": (
        functools.partial(ESAM, base_optimizer=SGD, lr=1e-3, beta=0.5, gamma=0.5),
        lambda use: use.optimizer.step(use.losses),
    ),
}


def nothing_grows_in_any_use() -> None:
    torch.set_num_threads(1)
    grown = [
        f"{name}: {line}"
        for name, (make, use) in USES.items()
        for line in growth(readings(Uses(make, use), STEPS // 30, 5))  # type: ignore[arg-type]
    ]
    assert not grown, "\n".join(grown)


def nothing_grows() -> None:
    torch.set_num_threads(1)
    grown = [
        f"{name}: {line}"
        for name, (make, share) in TRAININGS.items()
        for line in growth(readings(make(), int(STEPS * share), 5))
    ]
    assert not grown, "\n".join(grown)


@pytest.mark.parametrize("case", [nothing_grows, nothing_grows_in_any_use])
def test_memory_and_tables_do_not_grow(case: Callable[[], None]) -> None:
    """In a process in which nothing else happens."""
    run_apart(case)


def test_growth_is_noticed() -> None:
    """A training that keeps one tensor of every step, and readings of every other kind."""
    make, _ = TRAININGS["SAM over SGDM"]
    training = make()
    training.optimizer.kept = []
    step_alone = training.step

    def keeping() -> None:
        step_alone()
        training.optimizer.last.kept = training.optimizer.kept
        training.optimizer.kept.append(torch.zeros(1))

    training.step = keeping  # type: ignore[method-assign]
    found = " ".join(growth(readings(training, 50, 5)))
    assert "tensors" in found and "entries" in found
    still = Reading(10, 100, 5, 5, 5, 5)
    levels = [still._replace(steps=10 * n) for n in range(1, 11)]
    assert growth(levels) == []
    assert growth([*levels[:-1], levels[-1]._replace(files=5 + AT_ONCE)]) == []
    assert "files" in growth([*levels[:-1], levels[-1]._replace(files=6 + AT_ONCE)])[0]
    at_once = [*levels[:-1], levels[-1]._replace(resident=100 + PAGES_AT_ONCE)]
    assert growth(at_once) == []
    assert "resident" in growth([*levels[:-1], levels[-1]._replace(resident=1000)])[0]
    for each, allowed in ((PAGES // 8, True), (PAGES // 8 + 1, False)):  # in each of 8 intervals
        steady = [level._replace(resident=level.steps // 10 * each) for level in levels]
        assert (growth(steady) == []) is allowed
    assert growth([levels[0]._replace(files=1), *levels[1:]]) == [], "that is when caches fill"


def test_recomputed_weights_walk_at_random_where_e_is_larger() -> None:
    """And only there, and at the edges of binades: 256 weights of each size, 10^3 steps."""
    last = walk(1000)[-len(MAGNITUDES) :]
    small = [each for each in last if each.expected is not None]
    assert [each.magnitude for each in small] == pytest.approx([1e-5, 0.0])
    for each in small:  # a root mean square of 256 is off by 4 % typically
        assert 0.8 < each.typical / each.expected < 1.25  # type: ignore[operator]
        assert each.moved > 0.99
    large = last[0]
    assert large.magnitude == 0.1
    assert 0 < large.moved < 0.15, "next to powers of two"
    assert large.typical < small[0].typical


@pytest.mark.parametrize(
    "options",
    [
        {"restore": "backup"},
        {"dtype": torch.bfloat16},
        {"dtype": torch.bfloat16, "master_weights": True},
    ],
)
def test_copies_do_not_drift(options: dict[str, Any]) -> None:
    assert all(each.farthest == 0 for each in walk(300, **options))


def test_the_same_gradient_again_moves_no_weight_twice(backend: str) -> None:
    """What a first step has rounded off is no more there to be lost."""
    params = parameters("unaligned", torch.float32)
    with torch.no_grad():
        for param in params:
            param *= torch.logspace(-8, 0, param.numel()).reshape(param.shape)
    first = torch.cat([param.detach().flatten() for param in params])
    optimizer = SAM(params, SGD, lr=0.0, rho=0.5, backend=backend)
    ends = []
    for _ in range(20):
        step(optimizer, params, 0)
        ends.append(torch.cat([param.detach().flatten() for param in params]))
    assert not torch.equal(ends[0], first)
    assert all(torch.equal(end, ends[0]) for end in ends)


def test_the_drift_of_a_training_is_less_than_that_of_float32() -> None:
    last = trainings("noise alone", 500)[-1]
    assert 0 < last.typical < 0.25 * last.of_float32
    kept = {"dtype": torch.bfloat16, "master_weights": True}
    assert all(each.farthest == 0 for each in trainings("noise alone", 200, **kept))


def test_the_command_writes_its_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- long: walk -->\n<!-- end -->\nafter\n")
    arguments = ["long", "--steps", "100", "--only", "walk", "--out", str(tmp_path)]
    command.main([*arguments, "--page", str(page)])
    assert capsys.readouterr().out.count("as promised") == 4
    rows = read_rows(tmp_path / "long.csv")
    assert {row["part"] for row in rows} == {"walk"}
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n")
    assert "| float32, recomputed | 0.1 | 100 |" in text
    assert tables(rows)["long: walk"] in text
    command.main(arguments)  # replaces its rows
    assert len(read_rows(tmp_path / "long.csv")) == len(rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "10"], "10 is out of range, expected a whole number in [100, 1000000000]"),
        (["--only", "nothing"], "'nothing' is in no case; there are growth: SAM over SGDM; "),
    ],
)
def test_wrong_arguments_are_named(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as error:
        long.main(arguments)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_the_page_has_the_figures_of_the_results() -> None:
    folder = ROOT / "docs" / "reliability"
    page = (folder / "longruns.md" if folder.exists() else folder.with_suffix(".md")).read_text()
    rows = read_rows(RESULTS / "reliability" / "long.csv")
    blocks = tables(rows)
    assert len(blocks) == 3
    assert filled(page, blocks) == page
