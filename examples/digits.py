"""What the examples share: handwritten digits, which scikit-learn ships, and a small network.

The data are 1,797 images of 8x8 pixels (UCI; Alpaydin and Kaynak, 1998), a fifth of
them for testing.
"""

from collections.abc import Iterator

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn


class Digits:
    """The images as float32 ``[n, 64]`` in 0 to 1, the classes as int64 ``[n]``."""

    def __init__(self) -> None:
        data = load_digits()
        x = torch.tensor(data.data, dtype=torch.float32) / 16
        y = torch.tensor(data.target)
        order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
        train, test = order[360:], order[:360]
        self.x, self.y = x[train], y[train]
        self.test_x, self.test_y = x[test], y[test]

    def batches(self, epochs: int, size: int = 64) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield shuffled batches."""
        generator = torch.Generator().manual_seed(1)
        for _ in range(epochs):
            for rows in torch.randperm(len(self.y), generator=generator).split(size):
                yield self.x[rows], self.y[rows]


def network(width: int = 128) -> nn.Module:
    """Return a perceptron with one hidden layer."""
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))


@torch.no_grad()
def accuracy(model: nn.Module, digits: Digits) -> float:
    """Return the share of the test images that are recognized."""
    return (model(digits.test_x).argmax(1) == digits.test_y).float().mean().item()
