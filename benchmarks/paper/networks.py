"""The networks of the papers' experiments, and small ones of the same kind."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import relu

NETWORKS = {
    "resnet18": "ResNet-18 for 32x32 images: 3x3 stem, no pooling before the blocks",
    "wrn28-10": "WideResNet-28-10, pre-activation, no dropout",
    "resnet-small": "ResNet of 3 blocks, 8 to 32 channels, for images of 8x8 pixels",
    "resnet-tabular": "residual multi-layer perceptron of 2 blocks, 64 wide, for rows of features",
}


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm, added to what came in.

    Where the shape changes, a 1x1 convolution with BatchNorm adapts what came in (option B).

    Args:
        inputs: Channels that come in.
        outputs: Channels that go out.
        stride: Of the first convolution, >= 1.

    Reference:
        He, Zhang, Ren, Sun: Deep Residual Learning for Image Recognition, CVPR 2016, Fig. 5.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.convolution1 = _convolution(inputs, outputs, 3, stride)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.convolution2 = _convolution(outputs, outputs, 3, 1)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                _convolution(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Return [b, outputs, h / stride, w / stride] for ``x`` [b, inputs, h, w]."""
        inner = relu(self.norm1(self.convolution1(x)))
        return relu(self.norm2(self.convolution2(inner)) + self.shortcut(x))


class PreActivationBlock(nn.Module):
    """BatchNorm, ReLU and 3x3 convolution, twice, added to what came in.

    Where the number of channels changes, the 1x1 convolution of the shortcut is applied after the
    first BatchNorm and ReLU, which both branches then share.

    Args:
        inputs: Channels that come in.
        outputs: Channels that go out.
        stride: Of the first convolution, >= 1.

    Reference:
        Zagoruyko, Komodakis: Wide Residual Networks, BMVC 2016, arXiv 1605.07146, Fig. 1 (c).
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.convolution1 = _convolution(inputs, outputs, 3, stride)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.convolution2 = _convolution(outputs, outputs, 3, 1)
        changes = stride != 1 or inputs != outputs
        self.shortcut = _convolution(inputs, outputs, 1, stride) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        """Return [b, outputs, h / stride, w / stride] for ``x`` [b, inputs, h, w]."""
        active = relu(self.norm1(x))
        kept = x if self.shortcut is None else self.shortcut(active)
        inner = relu(self.norm2(self.convolution1(active)))
        added: Tensor = self.convolution2(inner)
        return kept + added


class TabularBlock(nn.Module):
    """BatchNorm, linear layer, ReLU and linear layer, added to what came in; no dropout.

    The second layer has no bias: all that reads the sum begins with a BatchNorm, which takes a
    constant out again, so that its gradient would be nothing but rounding.

    Args:
        width: Of everything.

    Reference:
        Gorishniy, Rubachev, Khrulkov, Babenko: Revisiting Deep Learning Models for Tabular Data,
        NeurIPS 2021, arXiv 2106.11959, section 3.2.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width)
        self.linear1 = nn.Linear(width, width)
        self.linear2 = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return [b, width] for ``x`` [b, width]."""
        added: Tensor = self.linear2(relu(self.linear1(self.norm(x))))
        return x + added


def build(name: str, data_shape: tuple[int, ...], classes: int, seed: int) -> nn.Module:
    """Return a network on the CPU, float32, in training mode, with weights drawn from ``seed``.

    Convolutions are drawn after He et al. 2015 (normal, by the fan-out), linear layers as torch
    does it. The global random state is left as it was.

    Args:
        name: One of ``NETWORKS``.
        data_shape: Shape of one sample, without the batch: [channels, height, width] or, of
            "resnet-tabular", [features].
        classes: Number of logits, >= 2.
        seed: Of the weights.

    Raises:
        ValueError: Of a name that is not in ``NETWORKS``, a shape that the network cannot take,
            or fewer than 2 classes.
    """
    if name not in NETWORKS:
        raise ValueError(f"name is {name!r}, expected one of {', '.join(NETWORKS)}")
    axes = ("features",) if name == "resnet-tabular" else ("channels", "height", "width")
    if len(data_shape) != len(axes) or min(data_shape) < 1:
        wanted = ", ".join(axes)
        raise ValueError(f"data_shape is {tuple(data_shape)}, expected [{wanted}] for {name}")
    if classes < 2:
        raise ValueError(f"classes is {classes}, expected at least 2")
    # Only the generator of the CPU is seeded: torch.manual_seed would reseed those of all GPUs.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        network = _BUILDERS[name](data_shape[0], classes)
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return network


def _convolution(inputs: int, outputs: int, size: int, stride: int) -> nn.Conv2d:
    """Return a convolution that keeps the size at stride 1; a BatchNorm makes up for the bias."""
    return nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)


def _blocks(
    block: Callable[[int, int, int], nn.Module],
    inputs: int,
    stages: list[tuple[int, int]],
    each: int,
) -> list[nn.Module]:
    """Return ``each`` blocks for every (width, stride) of ``stages``; the first has the stride."""
    blocks = []
    for width, stride in stages:
        for position in range(each):
            blocks.append(block(inputs, width, stride if position == 0 else 1))
            inputs = width
    return blocks


def _head(width: int, classes: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes)]


def _resnet(channels: int, classes: int, stages: list[tuple[int, int]], each: int) -> nn.Module:
    width = stages[0][0]
    stem = [_convolution(channels, width, 3, 1), nn.BatchNorm2d(width), nn.ReLU()]
    blocks = _blocks(BasicBlock, width, stages, each)
    return nn.Sequential(*stem, *blocks, *_head(stages[-1][0], classes))


def _resnet18(channels: int, classes: int) -> nn.Module:
    return _resnet(channels, classes, [(64, 1), (128, 2), (256, 2), (512, 2)], each=2)


def _resnet_small(channels: int, classes: int) -> nn.Module:
    return _resnet(channels, classes, [(8, 1), (16, 2), (32, 2)], each=1)


def _wide_resnet(channels: int, classes: int) -> nn.Module:
    # 28 convolutions: the stem, two in each of three times four blocks, three shortcuts.
    blocks = _blocks(PreActivationBlock, 16, [(160, 1), (320, 2), (640, 2)], each=4)
    end = [nn.BatchNorm2d(640), nn.ReLU(), *_head(640, classes)]
    return nn.Sequential(_convolution(channels, 16, 3, 1), *blocks, *end)


def _resnet_tabular(features: int, classes: int) -> nn.Module:
    width = 64
    # The first layer has no bias for the reason given in TabularBlock.
    blocks = [TabularBlock(width) for _ in range(2)]
    end = [nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, classes)]
    return nn.Sequential(nn.Linear(features, width, bias=False), *blocks, *end)


_BUILDERS: dict[str, Callable[[int, int], nn.Module]] = {
    "resnet18": _resnet18,
    "wrn28-10": _wide_resnet,
    "resnet-small": _resnet_small,
    "resnet-tabular": _resnet_tabular,
}
