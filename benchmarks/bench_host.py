"""What limits a step over thousands of tiny tensors: reading their Python objects.

``python -m benchmarks.bench_host`` times, for 2,000 tensors of 64 elements, every question that a
step has to ask of each gradient, and a whole step of ours and of the plain fused base optimizer in
the same rounds. The kernels themselves move 6 MB.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from benchmarks.common import RESULTS
from wsam_fused import WSAM
from wsam_fused.gradients import GradientReader

TENSORS, ELEMENTS = 2000, 64

# Question -> how often a step asks it of every tensor: twice where both evaluations need it.
QUESTIONS = {
    "param.grad": 2,
    "grad.data_ptr()": 2,
    "grad.is_contiguous()": 2,
    "grad.dtype": 2,
    "grad.numel()": 2,
    "grad.get_device()": 2,
    "param.data_ptr(): has it moved?": 2,
    "param.is_contiguous(): has its layout changed?": 2,
    "increment_version(param): tell autograd": 2,
    "grad._is_view(): may we keep it?": 1,
    "param.grad = None": 1,
}


def questions(params: list[Tensor], grads: list[Tensor]) -> dict[str, Callable[[], object]]:
    """Return one pass over all tensors per question, in the fastest form that Python has."""

    def clear() -> None:
        for param in params:
            param.grad = None

    passes: list[Callable[[], object]] = [
        lambda: [param.grad for param in params],
        lambda: list(map(Tensor.data_ptr, grads)),
        lambda: all(map(Tensor.is_contiguous, grads)),
        lambda: {grad.dtype for grad in grads},
        lambda: list(map(Tensor.numel, grads)),
        lambda: list(map(Tensor.get_device, grads)),
        lambda: list(map(Tensor.data_ptr, params)),
        lambda: all(map(Tensor.is_contiguous, params)),
        lambda: increment_version(params),
        lambda: any(map(Tensor._is_view, grads)),
        clear,
    ]
    return dict(zip(QUESTIONS, passes, strict=True))


def measure(rounds: int) -> dict[str, float]:
    """Return the median milliseconds of every pass and of both steps."""
    params, twins = (
        [torch.nn.Parameter(torch.randn(ELEMENTS)) for _ in range(TENSORS)] for _ in range(2)
    )
    grads, second = ([torch.randn(ELEMENTS) for _ in params] for _ in range(2))
    ours = WSAM(params, torch.optim.AdamW, lr=1e-3)
    plain = torch.optim.AdamW(twins, lr=1e-3, fused=True)
    reader = GradientReader(params)
    spent = defaultdict(list)

    def timed(name: str, call: Callable[[], object]) -> None:
        start = time.perf_counter()
        call()
        spent[name].append(1e3 * (time.perf_counter() - start))

    def set_grads(targets: list[torch.nn.Parameter], values: list[Tensor] = grads) -> None:
        for target, grad in zip(targets, values, strict=True):
            target.grad = grad

    for _ in range(rounds):
        for name, call in questions(list(params), grads).items():
            set_grads(params)
            timed(name, call)
        # Each of these comes after the plain step, which leaves the caches as a training step does.
        set_grads(twins)
        timed("plain", plain.step)
        set_grads(params)
        timed("read", lambda: reader.read(take=True))
        plain.step()
        set_grads(params)
        timed("first", lambda: ours.first_step(zero_grad=True))
        set_grads(params, second)
        timed("second", ours.second_step)
    return {name: statistics.median(times[rounds // 4 :]) for name, times in spent.items()}


def report(found: dict[str, float]) -> str:
    """Render the table; everything in units of the plain step of the same run."""
    plain = found["plain"]
    asked = sum(times * found[name] for name, times in QUESTIONS.items())
    lines = [
        "| asked of 2,000 tensors | times a step | share of a plain fused AdamW step |",
        "|---|---:|---:|",
        *(f"| `{n}` | {t} | {t * found[n] / plain:.1%} |" for n, t in QUESTIONS.items()),
        f"| all questions, each a pass of its own, hot caches | | {asked / plain:.1%} |",
        f"| all of one evaluation in our one pass | 2 | {2 * found['read'] / plain:.1%} |",
        f"| our whole step | | {(found['first'] + found['second']) / plain:.1%} |",
    ]
    return "\n".join(lines)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=60, help="rounds (60); the medians count")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of cpu-host.md")
    arguments = parser.parse_args()
    if arguments.rounds < 4:
        parser.error(f"--rounds is {arguments.rounds}, expected at least 4")
    text = report(measure(arguments.rounds))
    note = (
        "Medians of one run on "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}; "
        f"`python -m benchmarks.bench_host --rounds {arguments.rounds}`.\n"
    )
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "cpu-host.md").write_text(
        f"# A step over {TENSORS} tensors of {ELEMENTS} elements\n\n{note}\n{text}\n"
    )
    print(text)


if __name__ == "__main__":
    main()
