"""What timm's training loop uses goes with a closure: its parts see one evaluation a step."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from by_hand import assert_same, state_of
from timm_without_torchvision import import_timm
from torch import Tensor, nn

from wsam_fused import BSAM, SAM, WSAM

try:
    timm = import_timm()
except ImportError as missing:
    pytest.skip(f"timm is not installed: {missing}", allow_module_level=True)

from timm.data.mixup import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.optim import Lamb, param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3, dispatch_clip_grad

ROOT = Path(__file__).parents[1]
METHODS = {"sam": SAM, "wsam": WSAM, "bsam": BSAM}
BASES = {"adamw": torch.optim.AdamW, "lamb": Lamb}
STEPS = 5


def tiny(model: str = "test_efficientnet") -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(model, num_classes=4, in_chans=1)


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(6, 1, 16, 16, generator=generator),
            torch.randint(4, (6,), generator=generator),
        )
        for _ in range(STEPS)
    ]


class Loop:
    """The parts of timm's train.py."""

    def __init__(self, method: str, base: str, **options: Any) -> None:
        self.model = tiny().train()
        groups = param_groups_weight_decay(self.model, weight_decay=0.05)
        self.optimizer: Any = METHODS[method](
            groups, BASES[base], rho=0.1, lr=1e-3, model=self.model, **options
        )
        self.schedule = CosineLRScheduler(
            self.optimizer, t_initial=STEPS, warmup_t=2, warmup_lr_init=1e-4, t_in_epochs=False
        )
        self.average = ModelEmaV3(self.model, decay=0.9)
        self.criterion = SoftTargetCrossEntropy()
        torch.manual_seed(4)

    def evaluate(self, x: Tensor, y: Tensor) -> Tensor:
        loss: Tensor = self.criterion(self.model(x), y)
        loss.backward()
        dispatch_clip_grad(self.model.parameters(), value=1.0, mode="agc")
        return loss

    def after_step(self, step: int) -> None:
        self.average.update(self.model, step)
        self.schedule.step_update(step + 1)


def trained(loop: Loop, closures: bool) -> Loop:
    import numpy

    numpy.random.seed(0)  # Mixup draws from it
    mixup = Mixup(mixup_alpha=0.5, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=4)
    optimizer = loop.optimizer
    for step, batch in enumerate(batches()):
        x, y = mixup(*batch)
        if closures:

            def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
                optimizer.zero_grad()
                return loop.evaluate(x, y)

            optimizer.step(closure)
        else:
            calls = (optimizer.first_step, optimizer.second_step, optimizer.third_step)
            for call in calls[: optimizer.evaluations]:
                loop.evaluate(x, y)
                call(zero_grad=True)
        loop.after_step(step)
    return loop


@pytest.mark.parametrize("base", list(BASES))
@pytest.mark.parametrize("method", list(METHODS))
def test_a_closure_equals_the_calls_one_by_one(method: str, base: str) -> None:
    first = trained(Loop(method, base), closures=True)
    second = trained(Loop(method, base), closures=False)
    assert_same(first.model, second.model)
    assert_same(first.average, second.average)
    changed = zip(first.model.parameters(), tiny().parameters(), strict=True)
    assert not any(torch.equal(param, before) for param, before in changed if param.numel() > 9)


def test_the_parts_see_one_evaluation_a_step() -> None:
    loop = Loop("wsam", "adamw")
    expected = state_of(loop.model)
    rates = []
    for step, (x, y) in enumerate(batches()):

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            loop.optimizer.zero_grad()
            return loop.evaluate(x, nn.functional.one_hot(y, 4).float())

        rates.append(loop.optimizer.param_groups[0]["lr"])
        loop.optimizer.step(closure)
        loop.after_step(step)
        for name, value in loop.model.state_dict().items():
            # As ModelEmaV3 computes it; counters are copied.
            share = 1.0 - loop.average.get_decay(step) if torch.is_floating_point(value) else 1
            expected[name] = expected[name].lerp(value, share) if share != 1 else value.clone()
    for name, value in loop.average.module.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-7, msg=name)
    counts = [v for n, v in loop.model.state_dict().items() if n.endswith("num_batches_tracked")]
    assert counts
    assert all(int(count) == STEPS for count in counts)
    assert rates[:3] == pytest.approx([1e-4, 5.5e-4, loop.schedule._get_lr(2)[0]])
    assert len({group["weight_decay"] for group in loop.optimizer.param_groups}) == 2


def test_bfloat16_autocast() -> None:
    loop = Loop("wsam", "adamw")
    (x, y), *_ = batches()

    def closure() -> Tensor:
        loop.optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss: Tensor = loop.criterion(loop.model(x), nn.functional.one_hot(y, 4))
        loss.backward()
        return loss

    losses = [loop.optimizer.step(closure).item() for _ in range(8)]
    assert losses[-1] < losses[0]


def test_the_example_runs() -> None:
    """With torchvision, test_examples.py runs it as it is."""
    if "torchvision" in sys.modules:
        pytest.skip("test_examples.py runs it")
    script = (
        f"import runpy, sys; sys.path[:0] = ['{ROOT}/tests', '{ROOT}/examples', '{ROOT}']; "
        "import timm_without_torchvision; timm_without_torchvision.import_timm(); "
        f"runpy.run_path('{ROOT}/examples/timm_digits.py', run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    reached = re.search(r"^accuracy: ([\d.]+)$", done.stdout, re.MULTILINE)
    wanted = re.search(
        r"^# Reaches: accuracy (0\.\d+)$", (ROOT / "examples/timm_digits.py").read_text(), re.M
    )
    assert reached
    assert wanted
    assert float(reached[1]) >= float(wanted[1])
