"""The small case that runs under compute-sanitizer notices what is wrong."""

from __future__ import annotations

from typing import Any

import gpu_small_case
import pytest
import torch
from cases import KEEPING
from gpu_small_case import BF16, F32, FOREIGN, STEPS, Row

from wsam_fused.backends.native import NativeBackend
from wsam_fused.plan import Point, Slot

CPU = torch.device("cpu")
NAME = "cuda-emulated"


@pytest.mark.parametrize("base", ["adamw", FOREIGN])
@pytest.mark.parametrize("layout", ["awkward", "sizes"])
def test_it_compares(base: str, layout: str) -> None:
    row = Row(F32, F32, base, "wsam", "plain", layout)
    assert gpu_small_case.compare(row, NAME, CPU) == STEPS


@pytest.mark.parametrize("keeping", KEEPING)
def test_it_compares_what_is_kept_otherwise(keeping: str) -> None:
    row = Row(BF16, BF16, "adamw", "wsam", "plain", keeping=keeping)
    assert gpu_small_case.compare(row, NAME, CPU) == STEPS
    assert row in gpu_small_case.rows(BF16, BF16)


def test_it_goes_through_all_rows(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    compare = gpu_small_case.compare
    seen = []

    def some(row: Row, backend: str, device: torch.device) -> int:
        seen.append(row)
        return compare(row, backend, device) if len(seen) % 20 == 0 else STEPS

    monkeypatch.setattr(gpu_small_case, "compare", some)
    gpu_small_case.main(["--backends", NAME, "--device", "cpu"])
    assert len(set(seen)) == len(seen) > 200
    output = capsys.readouterr().out
    assert "parameters float32, gradients bfloat16: 16 steps, 0 rows differ" in output
    assert output.endswith(f"compared {len(seen) * STEPS} steps, 0 rows differ\n")


@pytest.mark.parametrize("what", ["perturbation", "norm", "update"])
def test_it_notices_what_is_wrong(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    row = Row(F32, F32, "adamw", "wsam", "plain")
    perturb, reduce = NativeBackend.perturb, NativeBackend.reduce

    def no_perturb(backend: Any, tensors: Any, target: Point) -> None:
        tensors.flags[0] = float(target)

    def wrong_norm(backend: Any, tensors: Any, evaluation: int, **options: Any) -> None:
        reduce(backend, tensors, evaluation, **options)
        tensors.shared.scalars[Slot.METRIC_SQ] *= 9

    def no_update(backend: Any, tensors: Any, *arguments: Any, **options: Any) -> Any:
        return lambda: perturb(backend, tensors, Point.WEIGHTS)

    name, wrong = {
        "perturbation": ("perturb", no_perturb),
        "norm": ("reduce", wrong_norm),
        "update": ("updating", no_update),
    }[what]
    monkeypatch.setattr(NativeBackend, name, wrong)
    where = {"perturbation": "at the ascent point", "norm": "norms", "update": "step 0, parameter"}
    with pytest.raises(AssertionError, match=where[what]):
        gpu_small_case.compare(row, NAME, CPU)


def test_it_refuses_a_backend_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu_small_case.main(["--backends", "abacus"])
    assert "--backends has 'abacus', expected some of" in capsys.readouterr().err
