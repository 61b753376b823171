"""Make one training run."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

from benchmarks.paper import data as datasets
from benchmarks.paper import networks
from benchmarks.paper.data import Dataset, Split
from benchmarks.paper.methods import METHODS, build_optimizer
from benchmarks.paper.minimum import measure
from benchmarks.paper.runs import Outcome, Spec
from benchmarks.training_step import train_step

# Of an evaluation; on training sets of this size and less it is the whole set at once.
_EVALUATED_AT_ONCE = 1000
# Seeds of the order and of the network are far from each other, and from those of the data.
_ORDER_SEED, _PRETRAINING_SEED = 10_000, 20_000


def run(spec: Spec, folder: Path | None = None, device: str = "cpu") -> Outcome:
    """Train a network and return what it ended with.

    Args:
        spec: What decides the run.
        folder: With the CIFAR files.
        device: Of the training.
    """
    data = prepared(spec, folder, device)
    begin = time.perf_counter()
    net = train(spec, data, folder, device)
    seconds = time.perf_counter() - begin
    train_loss, train_accuracy = evaluate(net, data.train)
    validation_loss, validation_accuracy = evaluate(net, data.validation)
    minimum = measure(net, data.train) if spec.minimum else (None, None, None)
    return Outcome(
        train_loss,
        train_accuracy,
        validation_loss,
        validation_accuracy,
        evaluate(net, data.test)[1],
        *minimum,
        seconds,
    )


@functools.lru_cache(maxsize=8)
def _prepared(
    name: str, folder: Path | None, device: str, noise: float, seed: int, dtype: str
) -> Dataset:
    data = datasets.load(name, folder)
    if noise:
        data = datasets.with_label_noise(data, noise, seed)

    def moved(split: Split) -> Split:
        return Split(split.x.to(device, getattr(torch, dtype)), split.y.to(device))

    parts = (moved(data.train), moved(data.validation), moved(data.test))
    return Dataset(data.name, data.classes, *parts, data.augmented)


def prepared(spec: Spec, folder: Path | None, device: str) -> Dataset:
    """Return the data of a run on its device, with its label noise."""
    seed = spec.seed if spec.label_noise else 0
    return _prepared(spec.dataset, folder, device, spec.label_noise, seed, spec.dtype)


def fresh_network(spec: Spec, data: Dataset, seed: int, device: str) -> nn.Module:
    """Return a network with weights drawn from a seed."""
    net = networks.build(spec.model, tuple(data.train.x.shape[1:]), data.classes, seed)
    return net.to(device, getattr(torch, spec.dtype))


def train(spec: Spec, data: Dataset, folder: Path | None, device: str) -> nn.Module:
    """Return the network of a run, trained.

    Args:
        spec: What decides the run.
        data: As :func:`prepared` returns it.
        folder: With the CIFAR files.
        device: Of the training.
    """
    net = fresh_network(spec, data, spec.seed, device)
    if spec.pretrained:
        net.load_state_dict(_pretrained(_pretraining(spec), folder, device))
    train_network(net, spec, data)
    return net


def train_network(net: nn.Module, spec: Spec, data: Dataset) -> None:
    """Train a network as a spec has it."""
    torch.manual_seed(spec.seed)
    optimizer = build_optimizer(spec, net)
    batches_per_epoch = max(1, len(data.train.y) // spec.batch_size)
    schedule = CosineAnnealingLR(optimizer, T_max=spec.epochs * batches_per_epoch)
    net.train()
    for x, y in batches(spec, data, batches_per_epoch):
        if spec.method == "n-SAM":
            _n_sam_step(net, optimizer, data.train, x, y)
        else:
            parts = -(-len(y) // dict(spec.hyper)["m"]) if spec.method == "m-SAM" else 1
            train_step(METHODS[spec.method].takes, net, optimizer, x, y, parts=parts)
        schedule.step()


def batches(spec: Spec, data: Dataset, per_epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield all mini-batches of a run, in an order drawn from its seed."""
    generator = torch.Generator().manual_seed(_ORDER_SEED + spec.seed)
    for _ in range(spec.epochs):
        order = torch.randperm(len(data.train.y), generator=generator).to(data.train.y.device)
        for index in order.split(spec.batch_size)[:per_epoch]:
            x = data.train.x[index]
            yield (datasets.augment(x, generator) if data.augmented else x), data.train.y[index]


def evaluate(net: nn.Module, split: Split) -> tuple[float, float]:
    """Return the mean cross entropy and the accuracy in per cent, in evaluation mode."""
    net.eval()
    loss, hits = 0.0, 0
    with torch.no_grad():
        for x, y in zip(
            split.x.split(_EVALUATED_AT_ONCE), split.y.split(_EVALUATED_AT_ONCE), strict=True
        ):
            logits = net(x)
            loss += cross_entropy(logits.double(), y, reduction="sum").item()
            hits += int((logits.argmax(1) == y).sum())
    return loss / len(split.y), 100.0 * hits / len(split.y)


def _n_sam_step(net: nn.Module, optimizer: Optimizer, whole: Split, x: Tensor, y: Tensor) -> None:
    """Perturb by the gradient of the whole training set, and update by that of the mini-batch."""
    optimizer.zero_grad()
    for part in zip(
        whole.x.split(_EVALUATED_AT_ONCE), whole.y.split(_EVALUATED_AT_ONCE), strict=True
    ):
        (cross_entropy(net(part[0]), part[1], reduction="sum") / len(whole.y)).backward()
    optimizer.first_step(zero_grad=True)
    cross_entropy(net(x), y).backward()
    optimizer.second_step(zero_grad=True)


def _pretraining(spec: Spec) -> Spec:
    """Return the run that a pre-trained network comes from: one for all seeds and methods."""
    return Spec(
        spec.dataset,
        spec.model,
        "SGDM",
        (),
        lr=0.05,
        weight_decay=1e-3,
        epochs=spec.pretrained,
        batch_size=spec.batch_size,
        seed=_PRETRAINING_SEED,
        dtype=spec.dtype,
    )


@functools.lru_cache(maxsize=2)
def _pretrained(spec: Spec, folder: Path | None, device: str) -> dict[str, Tensor]:
    """Return the weights of the network that a spec trains."""
    return train(spec, prepared(spec, folder, device), folder, device).state_dict()
