"""A short training run, by an interpreter that has a wheel of this package and a torch.

test_wheel.py starts it as ``python -I wheel_smoke.py FOLDER TOLERANCES``: the folder that the
package must come from; ``{dtype: [rtol, atol]}`` as JSON.
"""

from __future__ import annotations

import io
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

warnings.simplefilter("error")  # those of the import are torch's own

import wsam_fused  # noqa: E402
from wsam_fused import GSAM, WSAM, _extension  # noqa: E402


def run(method: Any, backend: str, dtype: torch.dtype, **options: Any) -> Any:
    """Make a step; return the model and the optimizer."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 40), torch.nn.Tanh(), torch.nn.Linear(40, 3))
    model.to(dtype)
    x, y = torch.randn(16, 5, dtype=dtype), torch.randn(16, 3, dtype=dtype)
    base = torch.optim.AdamW
    optimizer = method(model.parameters(), base, rho=0.1, lr=0.01, backend=backend, **options)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(model(x), y)
        loss.backward()
        return loss

    return model, optimizer, closure


def compare(method: Any, dtype: torch.dtype, rtol: float, atol: float, **options: Any) -> None:
    """Step with the compiled kernels and with the reference, from the same weights."""
    (model, ours, closure), (twin, reference, twin_closure) = (
        run(method, backend, dtype, **options) for backend in ("cpu", "eager")
    )
    for _ in range(3):
        before = next(model.parameters()).detach().clone()
        ours.step(closure)
        reference.step(twin_closure)
        assert not torch.equal(before, next(model.parameters()))
        for param, expected in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(param, expected, rtol=rtol, atol=atol)
            for key, value in ours.state[param].items():
                wanted = reference.state[expected][key]
                torch.testing.assert_close(value, wanted, rtol=rtol, atol=atol)
                value.copy_(wanted)
            param.data.copy_(expected.data)


def continue_from_checkpoint() -> None:
    """Save, load into a new optimizer and into the base optimizer, and go on."""
    model, optimizer, closure = run(WSAM, "auto", torch.float32)
    optimizer.step(closure)
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    twin, other, other_closure = run(WSAM, "auto", torch.float32)
    twin.load_state_dict(weights)
    other.load_state_dict(state)
    torch.optim.AdamW(twin.parameters()).load_state_dict(state)
    for one, call in ((optimizer, closure), (other, other_closure)):
        one.step(call)
    for param, expected in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(param, expected)


def main() -> None:
    """Check where the package comes from and that its kernels are used."""
    folder, tolerances = Path(sys.argv[1]), json.loads(sys.argv[2])
    assert Path(wsam_fused.__file__).is_relative_to(folder), wsam_fused.__file__
    assert _extension.UNAVAILABLE is None, _extension.UNAVAILABLE
    assert _extension.READ_GRADIENTS is not None
    for name, (rtol, atol) in tolerances.items():
        compare(WSAM, getattr(torch, name), rtol, atol)
        compare(GSAM, getattr(torch, name), rtol, atol, max_grad_norm=0.1, geometry="fisher")
    continue_from_checkpoint()
    print(f"python {sys.version.split()[0]}, torch {torch.__version__}: passed")


if __name__ == "__main__":
    main()
