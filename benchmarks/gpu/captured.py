"""Measure our step captured in CUDA graphs.

    python -m benchmarks.gpu.captured SHAPES BASE DTYPE [--rounds N]

Prints one line of JSON. A process of its own: a capture that fails may leave the device unusable
for what comes after it.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import torch

from benchmarks.common import spread
from benchmarks.contenders import OursCuda
from benchmarks.gpu.case import DTYPES, Case
from benchmarks.gpu.clock import Clock, CopyBuffer
from benchmarks.gpu.notes import reason_of
from benchmarks.gpu.process import json_of
from benchmarks.harness import Problem

_WARMUP = 3
_COMPARED = 2


class Captured:
    """Both halves of a step as two graphs, with gradients that stay where they are.

    Args:
        case: What is stepped.
        device: A CUDA device.
    """

    def __init__(self, case: Case, device: torch.device) -> None:
        self.problem = Problem(case.sizes, device=device, dtype=case.torch_dtype)
        self._ours = OursCuda(self.problem.params, case.base_optimizer)
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            for _ in range(_WARMUP):
                self.problem.step(self._ours)
        torch.cuda.current_stream(device).wait_stream(side)
        torch.cuda.synchronize(device)
        self.first, self.second = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        self.problem.set_first()
        with torch.cuda.graph(self.first):
            self._ours.first()
        self.problem.set_second()
        with torch.cuda.graph(self.second, pool=self.first.pool()):
            self._ours.second()


def check(case: Case, captured: Captured, device: torch.device) -> None:
    """Compare replayed steps with steps that are not captured.

    Raises:
        RuntimeError: The parameters differ.
    """
    for _ in range(_COMPARED):
        captured.first.replay()
        captured.second.replay()
    twin = Problem(case.sizes, device=device, dtype=case.torch_dtype)
    ours = OursCuda(twin.params, case.base_optimizer)
    for _ in range(_WARMUP + _COMPARED):
        twin.step(ours)
    pairs = zip(captured.problem.params, twin.params, strict=True)
    if not all(torch.equal(replayed, expected) for replayed, expected in pairs):
        raise RuntimeError("a replayed step differs from one that is not captured")


def measure(case: Case, rounds: int, device: torch.device) -> dict[str, Any]:
    """Return the spread of the device's and the host's milliseconds per replayed step."""
    clock = Clock(device)
    captured = Captured(case, device)
    check(case, captured, device)
    copy = CopyBuffer(clock)
    on_device, on_host = [], []
    for _ in range(rounds):
        spans = []
        for graph in (captured.first, captured.second):
            copy.run()
            start = clock.stamp()
            graph.replay()
            spans.append((start, clock.stamp()))
        clock.wait()
        on_device.append(sum(clock.milliseconds(*span) for span in spans))
        host = 0
        for graph in (captured.first, captured.second):
            start = time.perf_counter_ns()
            graph.replay()
            host += time.perf_counter_ns() - start
            clock.wait()
        on_host.append(host / 1e6)
    return {
        **{f"device_{key}": value for key, value in spread(on_device).items()},
        **{f"host_{key}": value for key, value in spread(on_host).items()},
    }


def in_a_process(case: Case, rounds: int, limit_s: float) -> dict[str, Any]:
    """Measure in a process of its own.

    Returns:
        What was measured, or ``note`` with the reason why nothing was.
    """
    return json_of(["benchmarks.gpu.captured", *case, "--rounds", str(rounds)], limit_s)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shapes")
    parser.add_argument("base", choices=["SGDM", "AdamW"])
    parser.add_argument("dtype", choices=list(DTYPES))
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    case = Case(options.shapes, options.base, options.dtype)
    try:
        if not torch.cuda.is_available():
            raise RuntimeError("there is no CUDA device")
        found = measure(case, options.rounds, torch.device("cuda"))
    except Exception as error:
        found = {"note": reason_of(error)}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
