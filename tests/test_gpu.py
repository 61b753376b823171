"""What only a GPU shows: no waiting, CUDA graphs, launches, streams, huge tensors, several GPUs."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import per_sample_cases
import pytest
import torch
from cases import BASES, KEEPING, METHODS, parameters, step
from gpu_training import Training
from torch import Tensor

from wsam_fused import WSAM, _extension
from wsam_fused.backends import BACKENDS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

FUSED = [name for name in ("cuda", "triton") if BACKENDS[name].unavailable() is None]


@pytest.fixture(params=FUSED)
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend that this GPU can use."""
    return str(request.param)


def test_what_is_built_or_installed_can_be_used() -> None:
    """Else all tests of a backend would be left out without a word."""
    if _extension._library("_cuda") is not None:
        assert BACKENDS["cuda"].unavailable() is None
    if find_spec("triton") is not None:
        assert BACKENDS["triton"].unavailable() is None


METHODS_AND_OPTIONS = pytest.mark.parametrize(
    "options",
    [
        {},
        {"adaptive": True},
        {"geometry": "fisher"},
        {"max_grad_norm": 1.0},
        {"method": "gsam"},
        {"method": "gsam", "max_grad_norm": 1.0, "geometry": "adaptive"},
        {"method": "bsam"},
        {"method": "bsam-as-published", "geometry": "fisher"},
        *({"dtype": torch.bfloat16, **kept} for kept in KEEPING.values()),
        {"dtype": torch.float16, "method": "bsam-as-published", **KEEPING["master"]},
        {"dtype": torch.bfloat16, "adaptive": True, **KEEPING["master-narrow"]},
    ],
)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature")
@METHODS_AND_OPTIONS
@pytest.mark.parametrize("tensor_lr", [False, True])
def test_a_step_never_waits(
    tensor_lr: bool, options: dict[str, Any], backend: str, errors_on_waiting: Callable[[], None]
) -> None:
    lr: Any = torch.tensor(0.01, device="cuda") if tensor_lr else 0.01
    training = Training(backend, lr, **options)
    training.step()
    before = training.state()
    errors_on_waiting()
    if not tensor_lr:
        training.optimizer.param_groups[0]["lr"] = 0.02
    training.step()
    torch.cuda.set_sync_debug_mode("default")
    assert not torch.equal(before[0], training.params[0])


@METHODS_AND_OPTIONS
def test_a_captured_step_equals_an_uncaptured_one(options: dict[str, Any], backend: str) -> None:
    lr = torch.tensor(0.01, device="cuda")
    captured, plain = (Training(backend, lr, **options) for _ in range(2))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for number in range(3):
            captured.set_inputs(number)
            captured.step()
    torch.cuda.current_stream().wait_stream(side)
    for number in range(3):
        plain.set_inputs(number)
        plain.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()
    for number, rate in enumerate((0.01, 0.05, 0.002, 0.03), start=3):
        lr.fill_(rate)
        captured.set_inputs(number)
        graph.replay()
        plain.set_inputs(number)
        plain.step()
        for ours, expected in zip(captured.state(), plain.state(), strict=True):
            assert torch.equal(ours, expected)
    # An uncaptured step in between must not disturb the replays.
    captured.set_inputs(10)
    captured.step()
    plain.set_inputs(10)
    plain.step()
    captured.set_inputs(11)
    graph.replay()
    plain.set_inputs(11)
    plain.step()
    for ours, expected in zip(captured.state(), plain.state(), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature")
@pytest.mark.parametrize("method", per_sample_cases.METHODS)
def test_a_step_with_losses_of_samples_never_waits(
    method: str, backend: str, errors_on_waiting: Callable[[], None]
) -> None:
    params = parameters("unaligned", torch.float32, "cuda")
    slopes = [torch.randn(6, *param.shape, device="cuda") for param in params]

    def losses_fn(index: Tensor | None = None) -> Tensor:
        parts = [(s * p).flatten(1).sum(1) for s, p in zip(slopes, params, strict=True)]
        losses = torch.stack(parts).sum(0)
        return losses if index is None else losses[index]

    optimizer = per_sample_cases.METHODS[method](params, BASES["adamw"], backend=backend)
    optimizer.step(losses_fn)
    optimizer.step(losses_fn)
    before = [param.detach().clone() for param in params]
    errors_on_waiting()
    optimizer.step(losses_fn)
    torch.cuda.set_sync_debug_mode("default")
    assert not any(torch.equal(param, w) for param, w in zip(params, before, strict=True))
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="draws random numbers on the host"):
        with torch.cuda.graph(graph):
            optimizer.step(losses_fn)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature")
@pytest.mark.parametrize("method", ["sam", "wsam", "gsam"])
def test_a_step_over_micro_batches_never_waits(
    method: str, backend: str, errors_on_waiting: Callable[[], None]
) -> None:
    training = Training(backend, 0.01, method)

    def closure() -> Tensor:
        loss = training.loss()
        loss.backward()
        return loss

    training.optimizer.step([closure, closure])
    before = training.state()
    errors_on_waiting()
    training.optimizer.step([closure, closure])
    torch.cuda.set_sync_debug_mode("default")
    assert not torch.equal(before[0], training.params[0])


def test_launches_do_not_depend_on_the_number_of_tensors(backend: str) -> None:
    counts = []
    for tensors in (3, 2000):
        params = [torch.nn.Parameter(torch.randn(64, device="cuda")) for _ in range(tensors)]
        optimizer = WSAM(params, torch.optim.AdamW, lr=0.01, backend=backend)
        step(optimizer, params, 0)
        g1, g2 = ([torch.randn_like(param) for param in params] for _ in range(2))
        for param, grad in zip(params, g1, strict=True):
            param.grad = grad
        torch.cuda.synchronize()
        kinds = [torch.profiler.ProfilerActivity.CUDA]
        # acc_events: without it torch 2.11 warns that a second cycle would clear the first.
        with torch.profiler.profile(activities=kinds, acc_events=True) as profile:
            optimizer.first_step(zero_grad=True)
            for param, grad in zip(params, g2, strict=True):
                param.grad = grad
            optimizer.second_step()
            torch.cuda.synchronize()
        device = torch.autograd.DeviceType.CUDA
        counts.append(
            sum(event.count for event in profile.key_averages() if event.device_type == device)
        )
    assert counts[0] == counts[1]
    assert 3 <= counts[0] <= 6


def test_a_non_finite_gradient_skips_the_step_on_the_device(backend: str) -> None:
    training = Training(backend, 0.01, check_finite=True)
    training.step()
    before = training.state()
    training.inputs[1][7] = float("nan")
    training.step()
    for ours, expected in zip(training.state(), before, strict=True):
        assert torch.equal(ours, expected)
    assert training.optimizer.skipped_steps == 1


def test_work_is_queued_on_the_current_stream(backend: str) -> None:
    """On a stream that is busy for long: whoever does not wait for it comes too early."""
    results = []
    for name, device in ((backend, "cuda"), ("eager", "cpu")):
        torch.manual_seed(0)
        params = parameters("unaligned", torch.float32, device)
        optimizer = METHODS["wsam"](params, BASES["adamw"], rho=0.1, backend=name)
        step(optimizer, params, 0)  # makes the tables, which waits
        generator = torch.Generator().manual_seed(1)
        g1, g2 = (
            [torch.randn(p.shape, generator=generator).to(device) for p in params] for _ in range(2)
        )
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            if device == "cuda":
                torch.cuda._sleep(200_000_000)
            for param, grad in zip(params, g1, strict=True):
                param.data.mul_(2.0)
                param.grad = grad
            optimizer.first_step(zero_grad=True)
            for param, grad in zip(params, g2, strict=True):
                param.grad = grad
            optimizer.second_step()
        side.synchronize()
        results.append([param.detach().cpu() for param in params])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=4e-6)


def test_same_inputs_give_the_same_bits(backend: str) -> None:
    results = []
    for _ in range(3):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(3_000_001, device="cuda")) for _ in range(3)]
        optimizer = METHODS["wsam"](
            params, BASES["adamw"], rho=0.1, max_grad_norm=1, backend=backend
        )
        for number in range(2):
            step(optimizer, params, number)
        results.append([param.detach() for param in params])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_auto_takes_the_best_backend_and_says_so() -> None:
    params = parameters("unaligned", torch.bfloat16, "cuda")
    optimizer = METHODS["wsam"](params, BASES["adamw"], rho=0.1)
    expected = "cuda" if "cuda" in FUSED else "triton" if "triton" in FUSED else "eager"
    assert optimizer.backend_of(params[0]).startswith(f"{expected}:")


def test_parameters_that_went_to_the_gpu_are_followed(backend: str) -> None:
    model = torch.nn.Linear(5, 3)
    optimizer = METHODS["wsam"](model.parameters(), BASES["adamw"], rho=0.1)
    step(optimizer, list(model.parameters()), 0)
    model.cuda()
    optimizer._backend = backend
    step(optimizer, list(model.parameters()), 1)
    assert optimizer.backend_of(model.weight).startswith(backend)
    assert optimizer.state[model.weight]["exp_avg"].device.type == "cuda"


def test_a_gradient_on_another_device_is_refused_by_torch(backend: str) -> None:
    model = torch.nn.Linear(5, 3, device="cuda")
    optimizer = METHODS["wsam"](model.parameters(), BASES["adamw"], rho=0.1, backend=backend)
    step(optimizer, list(model.parameters()), 0)
    with pytest.raises(RuntimeError, match="device"):
        model.weight.grad = torch.ones(3, 5)  # before it could reach a kernel
    assert not optimizer.is_perturbed


@pytest.mark.parametrize("default", ["cuda", "cpu"])
def test_the_default_device_does_not_matter(default: str, backend: str) -> None:
    results = []
    for device, name in (("cuda", backend), ("cpu", "auto")):
        torch.manual_seed(0)
        params = parameters("unaligned", torch.float32, device)
        with torch.device(default):
            optimizer = METHODS["wsam"](params, BASES["adamw"], rho=0.1, backend=name)
            for seed in range(2):
                generator = torch.Generator("cpu").manual_seed(seed)
                for param in params:
                    values = torch.randn(param.shape, generator=generator, device="cpu")
                    param.grad = values.to(device)
                (optimizer.first_step if seed == 0 else optimizer.second_step)(zero_grad=True)
        results.append([param.detach().cpu() for param in params])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=4e-6)


def test_a_tensor_beyond_32_bits(backend: str) -> None:
    size = 2**31 + 77
    if torch.cuda.mem_get_info()[0] < 8 * 2 * size:
        pytest.skip("needs 32 GiB of free memory")
    param = torch.nn.Parameter(torch.full((size,), 1.0, dtype=torch.bfloat16, device="cuda"))
    optimizer = METHODS["sam"]([param], BASES["sgd"], rho=1.0, backend=backend)
    for first in (True, False):
        param.grad = torch.zeros_like(param)
        param.grad[-3:] = 4.0
        optimizer.first_step(zero_grad=True) if first else optimizer.second_step(zero_grad=True)
        if first:
            moved = param.detach()[-4:].tolist()
            assert moved[0] == 1.0
            assert moved[1:] == pytest.approx([1 + 3**-0.5] * 3, rel=2**-8)
    # lr 0.05: w - 0.05 * 4
    assert param.detach()[-4:].tolist() == pytest.approx([1.0, 0.8, 0.8, 0.8], rel=2**-8)
    assert param.detach()[:3].tolist() == [1.0, 1.0, 1.0]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_share_one_norm(backend: str) -> None:
    results = []
    for devices in (("cuda:0", "cuda:1"), ("cuda:0", "cuda:0")):
        torch.manual_seed(0)
        params = [p for device in devices for p in parameters("unaligned", torch.float64, device)]
        optimizer = METHODS["wsam"](params, BASES["adamw"], rho=0.5, backend=backend)
        step(optimizer, params, 0)
        results.append([param.detach().cpu() for param in params])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-13, atol=1e-13)
