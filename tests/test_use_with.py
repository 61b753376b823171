"""Every code block of docs/use_with.md runs as it is written."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from timm_without_torchvision import import_timm
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

PAGE = (Path(__file__).parents[1] / "docs" / "use_with.md").read_text()
LIBRARIES = ("accelerate", "lightning", "timm", "transformers")

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*The number of training batches"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
    pytest.mark.filterwarnings("ignore:.*tensorboard"),
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true"),
]


def blocks() -> list[Any]:
    """The code of each section, under its heading."""
    found = []
    for section in re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:]:
        title = section.partition("\n")[0]
        codes = re.findall(r"^```python\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
        assert codes, f"{title} has no code"
        found += [pytest.param(code, id=f"{title}-{i}") for i, code in enumerate(codes)]
    return found


@pytest.fixture(autouse=True)
def _forgets() -> Iterator[None]:
    """Accelerators of one process share a state."""
    yield
    if find_spec("accelerate"):
        from accelerate.state import AcceleratorState, GradientState

        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


class Classifier(nn.Module):
    """A network that the Trainer of Transformers can use as well."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(256, 10))

    def forward(self, x: Any, labels: Any = None) -> Any:
        output = self.net(x)
        if labels is None:
            return output
        return {"loss": nn.functional.cross_entropy(output, labels), "logits": output}


@pytest.mark.parametrize("code", blocks())
def test_block(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for library in LIBRARIES:
        if re.search(rf"^(import|from) {library}\b", code, re.MULTILINE):
            if find_spec(library) is None:
                pytest.skip(f"{library} is not installed")
            if library == "timm":
                import_timm()
    monkeypatch.chdir(tmp_path)
    x, y = torch.randn(24, 1, 16, 16), torch.randint(10, (24,))
    model = Classifier()
    names: dict[str, Any] = {
        "model": model,
        "loader": DataLoader(TensorDataset(x, y), batch_size=8),
        "criterion": nn.functional.cross_entropy,
        "dataset": [{"x": x[i], "labels": y[i]} for i in range(len(x))],
    }
    before = [param.detach().clone() for param in model.parameters()]
    exec(compile(code, "docs/use_with.md", "exec"), names)
    if "timm" not in code:
        pairs = zip(model.parameters(), before, strict=True)
        assert not any(torch.equal(param, old) for param, old in pairs)
    optimizer = names.get("optimizer") or names["trainer"].optimizers[0]
    inner = getattr(optimizer, "optimizer", optimizer)
    assert not inner.is_perturbed
    assert inner.param_groups[0]["sam_step"] in (2, 3)
