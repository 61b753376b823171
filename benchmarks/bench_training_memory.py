"""Peak memory of whole training steps, autograd and all: plain AdamW, and WSAM over it.

    python -m benchmarks.bench_training_memory [--nets ...] [--bases ...] [--device cuda]

On a CPU every allocation is recorded, on a GPU torch's allocator counts. Parameters, states,
activations and gradients are all in it, and the same for everybody except what an optimizer makes
of them. Results go to ``benchmarks/results`` as CSV and Markdown.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.common import RESULTS, environment
from benchmarks.contenders import BASES, Base, Contender, Ours, Plain
from benchmarks.contenders.authors import Authors
from benchmarks.contenders.libraries import OursInBackward
from benchmarks.recorded_memory import peak_of
from benchmarks.training_memory import SLACK, write
from benchmarks.training_nets import NETS, Net, perceptron, transformer

CONTENDERS: tuple[type[Contender], ...] = (Plain, Authors, Ours, OursInBackward)


@dataclass(frozen=True)
class Measured:
    """Bytes of a training run.

    Attributes:
        parameters: Of all parameters.
        largest: Of the largest one.
        peak: At the worst moment.
    """

    parameters: int
    largest: int
    peak: int


def measure(
    contender: type[Contender],
    base: Base,
    net: Net,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Measured:
    """Make two training steps.

    Args:
        contender: The optimizer.
        base: Its base optimizer.
        net: What is trained.
        dtype: Of the parameters.
        device: Where.
    """
    sizes = []

    def train() -> None:
        torch.manual_seed(0)
        model = net.build().to(device, dtype)
        batch = net.input().to(device)
        batch = batch.to(dtype) if batch.is_floating_point() else batch
        params = list(model.parameters())
        sizes[:] = [param.numel() * param.element_size() for param in params]
        one = contender(params, base)
        for _ in range(2):
            for half in (one.first, one.second)[: one.gradients]:
                for param in params:
                    param.grad = None
                model(batch).backward()
                half()

    peak = peak_of(train, device)
    return Measured(sum(sizes), max(sizes), peak)


# ---- checks ----------------------------------------------------------------------------------

_SMALL = {
    "perceptron": perceptron(1, width=256, layers=8),
    "transformer": transformer(1, 4, width=256, layers=2, vocabulary=500),
    "many activations": transformer(8, 32, width=64, layers=2, vocabulary=100),
}


@functools.cache
def _small(contender: type[Contender], base: str, net: str) -> Measured:
    return measure(contender, BASES[base], _SMALL[net])


@pytest.mark.parametrize(
    ("net", "base"), [("perceptron", "AdamW"), ("perceptron", "SGDM"), ("transformer", "AdamW")]
)
def bench_update_in_backward_adds_the_largest_parameter(net: str, base: str) -> None:
    """The promise of the design, where activations are few."""
    plain, found = _small(Plain, base, net), _small(OursInBackward, base, net)
    assert found.peak == pytest.approx(plain.peak + plain.largest, rel=SLACK)


@pytest.mark.parametrize("net", ["perceptron", "transformer"])
def bench_update_after_the_backward_adds_a_gradient_list(net: str) -> None:
    """The measurement tells the two apart, and sees what the authors' formulation keeps."""
    plain, ours = _small(Plain, "AdamW", net), _small(Ours, "AdamW", net)
    assert ours.peak == pytest.approx(plain.peak + plain.parameters, rel=SLACK)
    authors = _small(Authors, "AdamW", net)
    assert authors.peak >= (plain.peak + 3 * plain.parameters) * (1 - SLACK)


def bench_activations_are_beside_all_first_gradients() -> None:
    """The limit that the results state: nothing of g1 is freed before the second backward."""
    plain, found = (_small(one, "AdamW", "many activations") for one in (Plain, OursInBackward))
    assert plain.peak > 4.5 * plain.parameters, "there are not many activations"
    assert found.peak > (plain.peak + plain.largest) * (1 + SLACK)
    assert found.peak < (plain.peak + plain.parameters) * (1 + SLACK)


def _rows(options: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for net in (net for net in NETS if net.name in options.nets):
        for base in options.bases:
            for dtype in options.dtypes:
                plain = 0
                for contender in CONTENDERS:
                    found = measure(
                        contender,
                        BASES[base],
                        net,
                        dtype=getattr(torch, dtype),
                        device=options.device,
                    )
                    plain = found.peak if contender is Plain else plain
                    rows.append(
                        {
                            "net": net.name,
                            "base": base,
                            "contender": contender.name,
                            "dtype": dtype,
                            "parameter_bytes": found.parameters,
                            "largest_bytes": found.largest,
                            "peak_bytes": found.peak,
                            "plain_bytes": plain,
                        }
                    )
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure everything and write the results."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_training_memory", description=__doc__.splitlines()[0]
    )
    names = [net.name for net in NETS]
    parser.add_argument("--nets", nargs="+", default=names, choices=names)
    parser.add_argument("--bases", nargs="+", default=["AdamW"], choices=list(BASES))
    parser.add_argument("--dtypes", nargs="+", default=["float32"], choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args(arguments)
    given = sys.argv[1:] if arguments is None else arguments
    common = environment(" ".join(["python -m benchmarks.bench_training_memory", *given]))
    if options.device == "cuda":
        common["device"] = torch.cuda.get_device_name()
    rows = [{**row, **common} for row in _rows(options)]
    print(write(options.out / f"{options.device}-training-memory.csv", rows))


if __name__ == "__main__":
    main()
