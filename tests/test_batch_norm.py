"""Running statistics of every kind of layer, with ``model=``: as after one plain forward."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from wsam_fused import SAM, WSAM

# Layers with 4 channels, and the shape of a batch.
KINDS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "1d": (lambda: nn.BatchNorm1d(4), (6, 4)),
    "2d": (lambda: nn.BatchNorm2d(4), (6, 4, 3, 3)),
    "3d": (lambda: nn.BatchNorm3d(4), (6, 4, 2, 3, 2)),
    "sync": (lambda: nn.SyncBatchNorm(4), (6, 4, 3)),  # without a process group: as the others
    "converted": (lambda: nn.SyncBatchNorm.convert_sync_batchnorm(nn.BatchNorm2d(4)), (6, 4, 2, 2)),
    "lazy": (lambda: nn.LazyBatchNorm1d(), (6, 4)),
    "instance": (lambda: nn.InstanceNorm1d(4, affine=True, track_running_stats=True), (6, 4, 5)),
    "cumulative": (lambda: nn.BatchNorm1d(4, momentum=None), (6, 4)),  # divides by the count
    "no-affine": (lambda: nn.BatchNorm1d(4, affine=False), (6, 4)),
    "no-statistics": (lambda: nn.BatchNorm1d(4, track_running_stats=False), (6, 4)),
}


class Model(nn.Module):
    """Scales the input, so that statistics depend on a parameter, and normalizes it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        layer, shape = KINDS[kind]
        torch.manual_seed(0)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.norm = layer()
        self.x = torch.randn(shape) + 1
        self.target = torch.randn(shape)
        self.calls = 0
        self.fail_at = 0
        self(self.x)  # a lazy layer gets its parameters
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        output = self.norm(self.scale * x) * self.scale
        if self.calls == self.fail_at:
            raise ValueError("boom")
        return output


def closure_of(model: Model, optimizer: torch.optim.Optimizer) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(model.x), model.target)
        loss.backward()
        return loss

    return closure


def statistics(model: Model) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


@pytest.mark.parametrize("fails", [False, True], ids=["whole", "exception"])
@pytest.mark.parametrize("kind", KINDS)
def test_only_the_unperturbed_pass_counts(kind: str, fails: bool) -> None:
    model = Model(kind)
    twin = copy.deepcopy(model)
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1, rho=2.0, model=model)
    closure = closure_of(model, optimizer)
    for number in range(3):
        twin.load_state_dict(model.state_dict())
        twin(twin.x)
        buffers = list(model.buffers())
        if fails:
            model.fail_at = model.calls + 2
            with pytest.raises(ValueError, match="boom"):
                optimizer.step(closure)
            assert not optimizer.is_perturbed
        else:
            optimizer.step(closure)
        expected = statistics(twin)
        for name, value in statistics(model).items():
            assert torch.equal(value, expected[name]), f"step {number}, {name}"
        assert all(a is b for a, b in zip(model.buffers(), buffers, strict=True))


def test_without_model_the_perturbed_pass_counts_too() -> None:
    model = Model("1d")
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1, rho=2.0)
    optimizer.step(closure_of(model, optimizer))
    assert model.norm.num_batches_tracked == 3


@pytest.mark.parametrize("kind", ["1d", "sync", "instance"])
def test_a_layer_in_evaluation_mode_is_left_alone(kind: str) -> None:
    model = Model(kind)
    model.norm.eval()
    before = statistics(model)
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1, rho=2.0, model=model)
    optimizer.step(closure_of(model, optimizer))
    assert not optimizer._batch_norm._saved
    for name, value in statistics(model).items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("kind", ["1d", "cumulative"])
def test_what_overflows_at_the_perturbed_weights_does_not_stay(kind: str) -> None:
    model = Model(kind)
    optimizer = WSAM(model.parameters(), torch.optim.SGD, lr=0.0, rho=1e30, model=model)
    optimizer.step(closure_of(model, optimizer))
    assert all(torch.isfinite(value).all() for value in statistics(model).values())


def test_two_calls_and_restore() -> None:
    model = Model("2d")
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1, rho=2.0, model=model)
    closure = closure_of(model, optimizer)
    closure()
    after_first = statistics(model)
    optimizer.first_step(zero_grad=True)
    closure()
    assert not torch.equal(model.norm.running_mean, after_first["norm.running_mean"])
    optimizer.restore()
    for name, value in statistics(model).items():
        assert torch.equal(value, after_first[name]), name
