"""What 16-bit parameters cost and lose: bytes per parameter, and the way from float32 weights.

    python -m benchmarks.bench_precision [--steps 400] [--seeds 3]

Memory is recorded exactly, allocation by allocation, for a step of WSAM over AdamW on one large
parameter list. What is lost is seen by training a small network on handwritten digits along the
same batches as a float32 run, with steps that are small against the spacing of bfloat16: how far
the weights end from those of float32, relative to how far these have come, and the loss reached.
Writes ``benchmarks/results/cpu-precision.csv`` and ``.md``.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from benchmarks.common import PROVENANCE, RESULTS, environment, write_table
from benchmarks.recorded_memory import peak_of
from wsam_fused import WSAM

Mode = tuple[torch.dtype, dict[str, Any], bool]

# Parameters, options, and whether a GradScaler scales the loss.
MODES: dict[str, Mode] = {
    "float32": (torch.float32, {}, False),
    "bfloat16": (torch.bfloat16, {}, False),
    "bfloat16, `master_weights`": (torch.bfloat16, {"master_weights": True}, False),
    "bfloat16, `stochastic_rounding`": (torch.bfloat16, {"stochastic_rounding": True}, False),
    "bfloat16, `stochastic_rounding`, `state_dtype='parameter'`": (
        torch.bfloat16,
        {"stochastic_rounding": True, "state_dtype": "parameter"},
        False,
    ),
    "bfloat16, `state_dtype='parameter'`": (
        torch.bfloat16,
        {"state_dtype": "parameter"},
        False,
    ),
    "float16, `master_weights`, GradScaler": (torch.float16, {"master_weights": True}, True),
}
FIELDS = (
    "mode",
    "parameter_bytes",
    "state_bytes",
    "peak_bytes",
    "distance",
    "loss",
    "steps",
    "seeds",
    *PROVENANCE,
)
SHAPES = ((512, 512),) * 4
LEARNING_RATE = 2e-4


def memory(mode: Mode) -> tuple[float, float]:
    """Return bytes per parameter of the state, and of the worst moment above the parameters."""
    dtype, options, _ = mode
    params = [nn.Parameter(torch.full(shape, 0.02, dtype=dtype)) for shape in SHAPES]
    count = sum(param.numel() for param in params)
    optimizer = WSAM(params, torch.optim.AdamW, lr=1e-3, **options)

    def steps() -> None:
        for _ in range(2):
            for call in (optimizer.first_step, optimizer.second_step):
                for param in params:
                    param.grad = torch.full_like(param, 0.01)
                call(zero_grad=True)

    peak = peak_of(steps)
    states = [s for entry in optimizer.state_dict()["state"].values() for s in entry.values()]
    kept = sum(s.numel() * s.element_size() for s in states if s.dim() > 0)
    return kept / count, peak / count


def train(mode: Mode, steps: int, seed: int) -> tuple[Tensor, Tensor, float]:
    """Return the first and the last weights, flat, and the mean loss of the last tenth."""
    dtype, options, scales = mode
    torch.manual_seed(seed)
    data = load_digits()
    x = torch.tensor(data.data / 16, dtype=torch.float32)
    y = torch.tensor(data.target)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
    with torch.no_grad():  # all begin with the same weights, which every dtype holds
        for param in model.parameters():
            param.copy_(param.bfloat16())
    model = model.to(dtype)
    optimizer = WSAM(
        model.parameters(), torch.optim.AdamW, rho=0.05, gamma=0.5, lr=LEARNING_RATE, **options
    )
    scaler = GradScaler("cpu", enabled=scales, growth_interval=100)
    first = _weights(model)
    losses = []
    for _ in range(steps):
        rows = torch.randint(len(y), (64,))

        def closure(rows: Tensor = rows) -> Tensor:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x[rows].to(dtype)).float(), y[rows])
            scaler.scale(loss).backward()
            return loss

        losses.append(optimizer.step(closure, scaler=scaler).item())
        scaler.update()
    return first, _weights(model), statistics.fmean(losses[-steps // 10 :])


def _weights(model: nn.Module) -> Tensor:
    return torch.cat([param.detach().double().flatten() for param in model.parameters()])


def measure(steps: int, seeds: int) -> list[dict[str, object]]:
    """Measure every mode."""
    runs = {
        name: [train(mode, steps, seed) for seed in range(seeds)] for name, mode in MODES.items()
    }
    rows: list[dict[str, object]] = []
    for name, mode in MODES.items():
        state, peak = memory(mode)
        distances = [
            ((last - wide_last).norm() / (wide_last - first).norm()).item()
            for (first, wide_last, _), (_, last, _) in zip(runs["float32"], runs[name], strict=True)
        ]
        rows.append(
            {
                "mode": name,
                "parameter_bytes": mode[0].itemsize,
                "state_bytes": f"{state:.2f}",
                "peak_bytes": f"{peak:.2f}",
                "distance": f"{statistics.fmean(distances):.4f}",
                "loss": f"{statistics.fmean(loss for *_, loss in runs[name]):.4f}",
                "steps": steps,
                "seeds": seeds,
            }
        )
    return rows


def table(rows: Sequence[Any]) -> str:
    """Return the Markdown table of a result file."""
    lines = [
        "| parameters | bytes of a parameter | of its state | at most in a step, besides it "
        "| way from float32 | loss |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        lines.append(
            f"| {row['mode']} | {row['parameter_bytes']} | {float(row['state_bytes']):.0f} "
            f"| {float(row['peak_bytes']):.1f} | {float(row['distance']):.1%} "
            f"| {float(row['loss']):.3f} |"
        )
    one = rows[0]
    lines.append(
        f"\nWSAM over AdamW. *At most in a step*: states, both gradients, copies. *Way from "
        f"float32*: distance of the last weights from those of the float32 run after "
        f"{one['steps']} steps with a learning rate of {LEARNING_RATE:g} on handwritten digits, "
        f"relative to the way that this one went; mean of {one['seeds']} seeds "
        f"({one['device']}, torch {one['torch']}, {one['date']}, `{one['command']}`)."
    )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and write the result files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args(arguments)
    where = environment("make bench")
    rows = [{**row, **where} for row in measure(options.steps, options.seeds)]
    path = RESULTS / "cpu-precision.csv"
    found = table(write_table(path, FIELDS, rows))
    path.with_suffix(".md").write_text(f"# 16-bit parameters\n\n{found}\n")
    print(found)


if __name__ == "__main__":
    main()
