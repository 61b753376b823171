"""Parameters that come into other memory in the middle of a training: noticed, and stepped there.

The reference goes through the same; it knows no addresses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from tolerances import ONE_STEP, TRAJECTORY, Tolerance, close
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from wsam_fused import WSAM

Event = Callable[[nn.Module], object]
BEFORE, AFTER = 3, 3


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 4, 3, dtype=torch.float64)
        self.linear = nn.Linear(64, 2, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        images = x.to(self.linear.weight.dtype)
        return self.linear(torch.tanh(self.convolution(images)).flatten(1))


def rebind(net: nn.Module) -> None:
    for param in net.parameters():
        param.data = param.data.clone()


def into_one_block(net: nn.Module) -> None:
    """As flattened parameters are: views of one tensor."""
    params = list(net.parameters())
    block = torch.cat([param.detach().flatten() for param in params])
    parts = block.split([param.numel() for param in params])
    for param, part in zip(params, parts, strict=True):
        param.data = part.view(param.shape)


def transpose_gradients(net: nn.Module) -> None:
    """From now on every gradient of a matrix comes with other strides than its parameter."""

    def hook(param: Tensor) -> None:
        assert param.grad is not None
        param.grad = param.grad.t().contiguous().t()

    for param in net.parameters():
        if param.dim() == 2:
            param.register_post_accumulate_grad_hook(hook)


EVENTS: dict[str, Event] = {
    "float32-and-back": lambda net: net.float().double(),
    "rebound": rebind,
    "one-block": into_one_block,
    "channels-last": lambda net: net.to(memory_format=torch.channels_last),
    "gradients-transposed": transpose_gradients,
}


def train(backend: str, base: type[torch.optim.Optimizer], restore: str, event: Event) -> Net:
    """Some steps, the event, and some more."""
    torch.manual_seed(0)
    net = Net()
    optimizer = WSAM(net.parameters(), base, lr=0.05, rho=0.1, restore=restore, backend=backend)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = net(x).square().mean()
        loss.backward()
        return loss

    for number in range(BEFORE + AFTER):
        if number == BEFORE:
            event(net)
        x = torch.randn(5, 3, 6, 6, dtype=torch.float64)
        optimizer.step(closure)
    return net


def compare(ours: nn.Module, expected: nn.Module, tolerance: Tolerance) -> None:
    for (name, param), other in zip(ours.named_parameters(), expected.parameters(), strict=True):
        assert param.dtype == other.dtype
        assert param.stride() == other.stride()
        close(param.detach(), other.detach(), tolerance, name)


@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("restore", ["recompute", "backup"])
@pytest.mark.parametrize("base", [SGD, AdamW])
def test_a_training_goes_on_in_other_memory(
    base: type[torch.optim.Optimizer], restore: str, event: str, backend: str
) -> None:
    ours = train(backend, base, restore, EVENTS[event])
    compare(ours, train("eager", base, restore, EVENTS[event]), TRAJECTORY)
    if event != "float32-and-back":  # which rounds
        unmoved = train("eager", base, restore, lambda net: None)
        for param, other in zip(ours.parameters(), unmoved.parameters(), strict=True):
            close(param.detach(), other.detach(), TRAJECTORY, "against no event")


def test_a_training_goes_on_in_another_dtype(backend: str) -> None:
    """Weights and states are float32 from then on, and so are the steps."""
    ours = train(backend, AdamW, "recompute", nn.Module.float)
    expected = train("eager", AdamW, "recompute", nn.Module.float)
    rtol, atol = (AFTER * bound for bound in ONE_STEP[torch.float32])
    compare(ours, expected, Tolerance(rtol, atol))


@pytest.fixture
def _swapping() -> Iterator[None]:
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.usefixtures("_swapping")
def test_a_module_may_swap_its_parameters(backend: str) -> None:
    """With their gradients: torch refuses that where something has a weak reference to one."""
    swapped = train(backend, AdamW, "recompute", lambda net: net.float().double())
    torch.__future__.set_swap_module_params_on_conversion(False)
    compare(swapped, train("eager", AdamW, "recompute", EVENTS["float32-and-back"]), TRAJECTORY)


def test_parameters_that_were_replaced_are_named_as_a_cause(backend: str) -> None:
    """They are not the optimizer's. torch's own optimizers step the old ones, silently."""

    def assign(net: nn.Module) -> None:
        copies = {name: value.clone() for name, value in net.state_dict().items()}
        net.load_state_dict(copies, assign=True)

    with pytest.raises(RuntimeError, match=r"none of the 4 .* load_state_dict\(assign=True\)"):
        train(backend, SGD, "recompute", assign)


def test_loading_weights_in_place_changes_no_address(backend: str) -> None:
    def load(net: nn.Module) -> None:
        net.load_state_dict({name: value.clone() for name, value in net.state_dict().items()})

    loaded = train(backend, AdamW, "recompute", load)
    unmoved = train(backend, AdamW, "recompute", lambda net: None)
    assert all(map(torch.equal, loaded.parameters(), unmoved.parameters()))
