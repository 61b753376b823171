"""The code of docs/landscape.md runs as it is written, one block after the other."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tolerances import LANDSCAPE, close
from torch import nn

PAGE = (Path(__file__).parents[1] / "docs" / "landscape.md").read_text()


def net(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))


def test_the_code_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for library in ("scipy", "matplotlib"):
        pytest.importorskip(library, reason="the page uses it")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"model": net(0), "other": net(1)}
    names |= {"criterion": nn.functional.cross_entropy}
    names |= {"x": torch.randn(16, 6), "y": torch.randint(3, (16,))}
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    for block in blocks:
        exec(compile(block, "docs/landscape.md", "exec"), names)
    assert names["rise"] > 0.0
    assert names["rise_adaptive"] > 0.0
    assert names["eigenvalues"][0].item() == pytest.approx(names["top"], rel=1e-2)
    assert names["noise"] > 0.0
    # The loss is more curved along the first eigenvector than along the way elsewhere.
    assert names["steepest"].losses[0] > names["steepest"].losses[20]
    ends = names["between"]
    at_other = nn.functional.cross_entropy(names["other"].eval()(names["x"]), names["y"])
    at_one = ends.losses[(ends.coordinates - 1.0).abs().argmin()]
    close(at_one, at_other.detach().double(), LANDSCAPE[torch.float32], "loss of the other")
    assert (tmp_path / "line.png").stat().st_size > 1000
    assert (tmp_path / "plane.png").stat().st_size > 1000


def test_the_page_names_everything_that_is_public() -> None:
    from wsam_fused import landscape

    shown = {name for name in landscape.__all__ if name in PAGE}
    # Types of results, and what loss_slice_1d does by itself.
    assert set(landscape.__all__) - shown == {"HessianEigenpairs", "LossSlice", "random_direction"}
