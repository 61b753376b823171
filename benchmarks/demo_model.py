"""What the demonstration trains: the digits, a small convolutional net, and the training loop."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

from benchmarks.demo_methods import build_optimizer, train_step
from wsam_fused import landscape
from wsam_fused.optimizer import SharpnessAwareOptimizer

BATCH_SIZE = 64
SHARPNESS_RHO = 0.1
# Half of the digits are for testing: there are so few that 1 % of a smaller part is 3 images.
_TEST_SHARE = 0.5


@dataclass(frozen=True)
class Digits:
    """Images of shape [n, 1, 8, 8] and labels of shape [n], for training and for testing."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


@dataclass
class Timer:
    """Seconds per step, all of it and the optimizer's part."""

    step: list[float] = field(default_factory=list)
    optimizer: list[float] = field(default_factory=list)

    def add(self, step: float, optimizer: float) -> None:
        """Note a step."""
        self.step.append(step)
        self.optimizer.append(optimizer)

    # Medians, because the first step also builds the optimizer's tables.
    def median_step(self) -> float:
        """Return the median time of a step."""
        return statistics.median(self.step)

    def median_optimizer(self) -> float:
        """Return the median time inside the optimizer per step."""
        return statistics.median(self.optimizer)


@dataclass
class History:
    """One training run: figures after each epoch, and at the end."""

    method: str
    backend: str
    timer: Timer
    train_loss: list[float] = field(default_factory=list)
    test_accuracy: list[float] = field(default_factory=list)
    sharpness: float = float("nan")


def load(dtype: torch.dtype = torch.float32) -> Digits:
    """Return the handwritten digits of scikit-learn, split in the same way every time."""
    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images, labels, test_size=_TEST_SHARE, random_state=0, stratify=labels)
    train_x, test_x = (
        torch.from_numpy(part).to(dtype).div(16.0).sub(0.3).view(-1, 1, 8, 8) for part in parts[:2]
    )
    train_y, test_y = (torch.from_numpy(part).long() for part in parts[2:])
    return Digits(train_x, train_y, test_x, test_y)


def build_net(seed: int, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Return the net with weights drawn from ``seed``, the same values in every dtype.

    It is smooth, without ReLU and max-pooling: where a kink or a tie decides which way a gradient
    goes, one rounding leads to other weights, and two correct runs could not be compared.
    """
    torch.manual_seed(seed)

    def block(inputs: int, outputs: int) -> list[nn.Module]:
        # No bias: BatchNorm takes it out again, and its gradient would be nothing but rounding.
        convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        return [convolution, nn.BatchNorm2d(outputs), nn.SiLU()]

    features = [*block(1, 16), *block(16, 32), nn.AvgPool2d(2), *block(32, 64)]
    head = [nn.Flatten(), nn.Linear(64 * 4 * 4, 64), nn.SiLU(), nn.Linear(64, 10)]
    return nn.Sequential(*features, *head).to(dtype)


def backends_of(optimizer: Optimizer) -> dict[str, str]:
    """Return the backends that step the optimizer's parameters, each with the reason."""
    if not isinstance(optimizer, SharpnessAwareOptimizer):
        return {"torch": "plain torch.optim"}
    params = [param for group in optimizer.param_groups for param in group["params"]]
    answers = sorted({optimizer.backend_of(param) for param in params})
    return dict(answer.split(": ", 1) for answer in answers)


def batches(data: Digits, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield full batches without end, epoch after epoch, each in an order drawn from ``seed``."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(data.train_y), generator=generator)
        for index in order.split(BATCH_SIZE)[: steps_per_epoch(data)]:
            yield data.train_x[index], data.train_y[index]


def steps_per_epoch(data: Digits) -> int:
    """Return the number of full batches; a small last one would make its BatchNorm noisy."""
    return len(data.train_y) // BATCH_SIZE


def train(
    method: str,
    data: Digits,
    *,
    epochs: int,
    seed: int,
    backend: str,
    after_epoch: Callable[[History], None],
) -> History:
    """Train a new net with momentum SGD as the base and return how it went.

    Args:
        method: As for :func:`benchmarks.demo_methods.build_optimizer`.
        data: The digits.
        epochs: Passes over the training set, >= 1.
        seed: Decides the starting weights and the order of the images.
        backend: Backend of the methods that are ours.
        after_epoch: Called with the history so far, after each epoch.
    """
    net = build_net(seed)
    optimizer = build_optimizer(method, "SGDM", net, backend)
    schedule = CosineAnnealingLR(optimizer, T_max=epochs)
    history = History(method, "+".join(backends_of(optimizer)), Timer())
    stream = batches(data, seed)
    for _ in range(epochs):
        net.train()
        for _ in range(steps_per_epoch(data)):
            history.timer.add(*train_step(method, net, optimizer, *next(stream)))
        schedule.step()
        net.eval()
        with torch.no_grad():
            loss = cross_entropy(net(data.train_x), data.train_y)
            hits = net(data.test_x).argmax(1) == data.test_y
        history.train_loss.append(loss.item())
        history.test_accuracy.append(hits.double().mean().item())
        after_epoch(history)
    history.sharpness = sharpness(net, data)
    return history


def sharpness(net: nn.Module, data: Digits, rho: float = SHARPNESS_RHO) -> float:
    """Return L(w + e) - L(w) on the training set in eval mode, e = rho g / |g|, g = grad L(w)."""
    net.eval()
    return landscape.sharpness(net, lambda: cross_entropy(net(data.train_x), data.train_y), rho)
