"""The networks of the paper experiments: sizes, seeds, and that every parameter is used.

Parameters are counted against the layers as the papers describe them, written out here by hand.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from benchmarks.paper.networks import NETWORKS, PreActivationBlock, build

_SHAPES = {
    "resnet18": (3, 32, 32),
    "wrn28-10": (3, 32, 32),
    "resnet-small": (1, 8, 8),
    "resnet-tabular": (30,),
}
# Building the wide one takes half a second, and all that is tested here is in the others too.
_QUICK = [name for name in NETWORKS if name != "wrn28-10"]


def _count(network: nn.Module) -> int:
    return sum(param.numel() for param in network.parameters())


def _basic_block(inputs: int, outputs: int, adapted: bool) -> int:
    shortcut = inputs * outputs + 2 * outputs if adapted else 0
    return 9 * inputs * outputs + 2 * outputs + 9 * outputs * outputs + 2 * outputs + shortcut


def _resnet18_count(classes: int) -> int:
    total = 9 * 3 * 64 + 2 * 64 + 2 * _basic_block(64, 64, False)
    for inputs, outputs in ((64, 128), (128, 256), (256, 512)):
        total += _basic_block(inputs, outputs, True) + _basic_block(outputs, outputs, False)
    return total + (512 + 1) * classes


def _wide_count(classes: int) -> int:
    total = 9 * 3 * 16
    for inputs, outputs in ((16, 160), (160, 320), (320, 640)):
        total += 2 * inputs + 9 * inputs * outputs + 2 * outputs + 9 * outputs**2 + inputs * outputs
        total += 3 * (4 * outputs + 18 * outputs**2)
    return total + 2 * 640 + (640 + 1) * classes


def _small_count(classes: int) -> int:
    blocks = _basic_block(8, 8, False) + _basic_block(8, 16, True) + _basic_block(16, 32, True)
    return 9 * 1 * 8 + 2 * 8 + blocks + (32 + 1) * classes


def _tabular_count(classes: int) -> int:
    block = 2 * 64 + (64 + 1) * 64 + 64 * 64
    return 30 * 64 + 2 * block + 2 * 64 + (64 + 1) * classes


@pytest.mark.parametrize(
    ("name", "by_layers", "published"),
    [
        ("resnet18", _resnet18_count, 11_173_962),
        ("wrn28-10", _wide_count, 36_479_194),
        ("resnet-small", _small_count, None),
        ("resnet-tabular", _tabular_count, None),
    ],
)
def test_parameters_are_as_many_as_the_layers_have(name, by_layers, published) -> None:
    counts = [_count(build(name, _SHAPES[name], classes, seed=0)) for classes in (10, 2)]
    assert counts == [by_layers(10), by_layers(2)]
    assert published in (None, counts[0])


@pytest.mark.parametrize("name", _QUICK)
def test_every_parameter_gets_a_gradient(name: str) -> None:
    network = build(name, _SHAPES[name], 10, seed=0)
    x = torch.randn(8, *_SHAPES[name])
    logits = network(x)
    assert logits.shape == (8, 10)
    assert logits.dtype == torch.float32
    cross_entropy(logits, torch.arange(8)).backward()
    norms = {key: param.grad.norm().item() for key, param in network.named_parameters()}
    # One that only a BatchNorm reads would have the rounding of one, 1e-8 and less.
    assert {key: norm for key, norm in norms.items() if not norm > 1e-5} == {}


@pytest.mark.parametrize(("name", "size"), [("resnet18", 4), ("wrn28-10", 8), ("resnet-small", 2)])
def test_images_shrink_to_their_size_before_pooling(name: str, size: int) -> None:
    network = build(name, _SHAPES[name], 10, seed=0).eval()
    pooling = next(part for part in network if isinstance(part, nn.AdaptiveAvgPool2d))
    seen = []
    pooling.register_forward_hook(lambda _, given, __: seen.append(tuple(given[0].shape[2:])))
    with torch.no_grad():
        network(torch.randn(1, *_SHAPES[name]))
    assert seen == [(size, size)]


def test_wide_network_has_28_convolutions_and_gives_logits() -> None:
    network = build("wrn28-10", _SHAPES["wrn28-10"], 100, seed=0).eval()
    assert sum(isinstance(module, nn.Conv2d) for module in network.modules()) == 28
    with torch.no_grad():
        assert network(torch.randn(1, 3, 32, 32)).shape == (1, 100)


def test_pre_activation_block_by_hand() -> None:
    """A block that changes the width normalises for both branches; one that does not keeps x."""
    x = torch.randn(4, 2, 6, 6)
    same = PreActivationBlock(2, 2, 1)
    nn.init.zeros_(same.convolution2.weight)
    assert torch.equal(same(x), x)
    wider = PreActivationBlock(2, 3, 2)
    nn.init.zeros_(wider.convolution2.weight)
    mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), correction=0, keepdim=True)
    active = ((x - mean) / (var + 1e-5).sqrt()).clamp(min=0.0)
    weight = wider.shortcut.weight[:, :, 0, 0]
    by_hand = torch.einsum("oi,bihw->bohw", weight, active[:, :, ::2, ::2])
    torch.testing.assert_close(wider(x), by_hand, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", _QUICK)
def test_weights_come_from_the_seed_and_nothing_else(name: str) -> None:
    state = torch.get_rng_state()
    first = build(name, _SHAPES[name], 10, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(12345)
    again = build(name, _SHAPES[name], 10, seed=3).state_dict()
    other = build(name, _SHAPES[name], 10, seed=4).state_dict()
    assert all(torch.equal(value, again[key]) for key, value in first.state_dict().items())
    drawn = [key for key, param in first.named_parameters() if param.dim() > 1]
    assert drawn
    assert not any(torch.equal(again[key], other[key]) for key in drawn)


def test_convolutions_are_drawn_after_he() -> None:
    network = build("resnet18", (3, 32, 32), 10, seed=0)
    weights = [module.weight for module in network.modules() if isinstance(module, nn.Conv2d)]
    assert len(weights) == 1 + 16 + 3
    for weight in weights:
        outputs, _, height, width = weight.shape
        deviation = math.sqrt(2.0 / (outputs * height * width))
        # Six times the relative standard error of a deviation estimated from n values.
        error = 6 / math.sqrt(2 * weight.numel())
        assert weight.std().item() == pytest.approx(deviation, rel=error)


@pytest.mark.parametrize(
    ("name", "shape", "classes", "message"),
    [
        ("resnet19", (3, 32, 32), 10, r"name is 'resnet19', expected one of resnet18, wrn28-10"),
        ("resnet18", (30,), 10, r"data_shape is \(30,\), expected \[channels, height, width\]"),
        ("resnet-tabular", (1, 8, 8), 10, r"data_shape is \(1, 8, 8\), expected \[features\]"),
        ("resnet-small", (0, 8, 8), 10, r"data_shape is \(0, 8, 8\)"),
        ("resnet-small", (1, 8, 8), 1, r"classes is 1, expected at least 2"),
    ],
)
def test_wrong_arguments_are_named(name, shape, classes, message) -> None:
    with pytest.raises(ValueError, match=message):
        build(name, shape, classes, seed=0)
