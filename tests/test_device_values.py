"""What lives on a device: learning rates, uploads, and why a backend is chosen or not."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from cases import BASES, METHODS, parameters, step
from torch import Tensor
from torch.optim import SGD, AdamW, RMSprop

from wsam_fused import WSAM, _extension, backends, base_rules, groups, optimizer, upload
from wsam_fused.backends import gpu, select
from wsam_fused.plan import GroupRow
from wsam_fused.shared_scalars import SharedScalars
from wsam_fused.upload import Upload

CUDA = torch.device("cuda", 0)


@pytest.fixture
def rates_on_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every learning rate that is a tensor counts as one that only a device knows."""

    def device_learning_rate(group: dict[str, Any]) -> Tensor | None:
        lr = group.get("lr")
        return lr if isinstance(lr, Tensor) else None

    for module in (base_rules, groups, optimizer):
        monkeypatch.setattr(module, "device_learning_rate", device_learning_rate)


@pytest.mark.parametrize("base", [SGD, AdamW, RMSprop])
def test_a_learning_rate_on_the_device_is_read_by_every_update(
    base: Any, backend: str, rates_on_device: None
) -> None:
    results = []
    for on_device in (True, False):
        torch.manual_seed(0)
        params = parameters("unaligned", torch.float64)
        rates: list[Any] = [torch.tensor(0.1), torch.tensor(0.2)] if on_device else [0.1, 0.2]
        grouped = [{"params": params[:2], "lr": rates[0]}, {"params": params[2:], "lr": rates[1]}]
        one = WSAM(grouped, base, lr=rates[0], rho=0.1, backend=backend)
        for number, lr in enumerate((0.1, 0.05, 0.01)):
            if on_device:
                rates[0].fill_(lr)  # nobody tells the optimizer
            else:
                one.param_groups[0]["lr"] = lr
            step(one, params, number)
        results.append([param.detach() for param in params])
    for ours, expected in zip(*results, strict=True):
        # The rate went through float32.
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)


def test_a_learning_rate_on_the_device_is_never_read_by_the_host(rates_on_device: None) -> None:
    class Unreadable(Tensor):
        def __float__(self) -> float:
            raise AssertionError("the host asked for the learning rate")

        item = __float__

    params = parameters("unaligned", torch.float32)
    lr = torch.tensor(0.1).as_subclass(Unreadable)
    one = WSAM(params, torch.optim.SGD, lr=0.1, rho=0.1)
    one.param_groups[0]["lr"] = lr
    before = params[0].detach().clone()
    step(one, params, 0)
    assert not torch.equal(params[0], before)


class FakePinned:
    """Stands for pinned memory and a queued copy, and notes what is written where."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.capturing = False
        self.allocated_in_capture = 0
        monkeypatch.setattr(upload, "_is_capturing", lambda: self.capturing)
        monkeypatch.setattr(Upload, "_pinned", self.pinned())

    def pinned(self) -> Any:
        def make(one: Upload) -> Tensor:
            self.allocated_in_capture += self.capturing
            return torch.empty_like(one._target)

        return make


def test_uploads_never_share_memory_and_captured_ones_keep_theirs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake = FakePinned(monkeypatch)
    target = torch.zeros(3, dtype=torch.int64)
    one = Upload(target)
    one._queued = True
    one.send(torch.tensor([1, 2, 3]))
    fake.capturing = True
    one.send(torch.tensor([4, 5, 6]))
    assert fake.allocated_in_capture == 0
    captured = one._captured[0]
    fake.capturing = False
    for value in range(5):
        one.send(torch.full((3,), value))
    assert captured.tolist() == [4, 5, 6], "a replay would read something else"
    assert target.tolist() == [4, 4, 4]


def test_the_group_table_is_sent_again_once_a_graph_brings_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The host cannot see what replays have written, and a capture writes nothing at once."""
    fake = FakePinned(monkeypatch)
    sent: list[float] = []
    monkeypatch.setattr(Upload, "send", lambda one, values: sent.append(values[0, -7].item()))
    shared = SharedScalars(torch.device("cpu"))
    row = GroupRow(*[0.0] * len(GroupRow._fields))
    assert GroupRow._fields[-7] == "lr"
    shared.set_rows([row._replace(lr=0.1)])
    shared._upload._queued = True
    shared.set_rows([row._replace(lr=0.1)])
    assert sent == [0.1]
    fake.capturing = True
    shared.set_rows([row._replace(lr=0.1)])
    assert sent == [0.1, 0.1], "an ordinary step with other values would change the replays"
    shared._upload._captured.append(torch.zeros(0))  # as send() does
    fake.capturing = False
    for lr in (0.2, 0.2, 0.1):
        shared.set_rows([row._replace(lr=lr)])
    assert sent == [0.1, 0.1, 0.2, 0.2, 0.1]


def test_the_default_device_does_not_matter(backend: str) -> None:
    results = []
    for default in ("cpu", "meta"):
        torch.manual_seed(0)
        params = parameters("unaligned", torch.float32)
        for number in range(2):
            generator = torch.Generator().manual_seed(number)
            grads = [[torch.randn(p.shape, generator=generator) for p in params] for _ in "12"]
            with torch.device(default):
                if number == 0:
                    options = {"rho": 0.1, "adaptive": True, "backend": backend}
                    optimizer = METHODS["wsam"](params, BASES["adamw"], **options)
                for param, grad in zip(params, grads[0], strict=True):
                    param.grad = grad
                optimizer.first_step(zero_grad=True)
                for param, grad in zip(params, grads[1], strict=True):
                    param.grad = grad
                optimizer.second_step(zero_grad=True)
        results.append([param.detach() for param in params])
    for ours, expected in zip(*results, strict=True):
        assert torch.equal(ours, expected)


def test_cuda_parameters_are_stepped_by_the_best_that_is_available(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gpu, "too_old", lambda device: None)
    monkeypatch.setattr(_extension, "cuda_device_problem", lambda device: None)
    cuda, triton = backends.BACKENDS["cuda"], backends.BACKENDS["triton"]
    monkeypatch.setattr(cuda, "unavailable", lambda: None)
    monkeypatch.setattr(triton, "unavailable", lambda: None)
    assert select("auto", CUDA, torch.bfloat16) == ("cuda", "the fastest")
    monkeypatch.setattr(cuda, "unavailable", lambda: "not built")
    assert select("auto", CUDA, torch.float32) == ("triton", "cuda: not built")
    monkeypatch.setattr(triton, "unavailable", lambda: "no triton")
    choice = select("auto", CUDA, torch.float32)
    assert choice == ("eager", "cuda: not built; triton: no triton")
    with pytest.raises(RuntimeError, match="'cuda' is not available: not built"):
        select("cuda", CUDA, torch.float32)


def test_an_old_gpu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu.too_old.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    cuda = backends.BACKENDS["cuda"]
    monkeypatch.setattr(cuda, "unavailable", lambda: None)
    with pytest.raises(RuntimeError, match=r"compute capability is 7\.5, expected 8\.0 or newer"):
        select("cuda", CUDA, torch.float32)
    assert "7.5" in select("auto", CUDA, torch.float32).reason
    gpu.too_old.cache_clear()


def test_a_gpu_without_code_for_it_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(device: int) -> None:
        raise RuntimeError("CUDA error: no kernel image is available\nmore lines")

    class Operations:
        require_cuda_device = staticmethod(refuse)

    monkeypatch.setattr(torch.ops, "wsam_fused", Operations)
    monkeypatch.setattr(_extension, "cuda_architectures", lambda: "9.0")
    reason = _extension.cuda_device_problem.__wrapped__(CUDA)
    assert reason is not None
    assert reason.startswith("CUDA error: no kernel image is available; the kernels were compiled")
    assert "9.0" in reason


@pytest.mark.parametrize(
    ("version", "library", "driver", "expected"),
    [
        (None, True, True, "has no CUDA support; install a CUDA build"),
        ("13.0", False, True, "install a CUDA toolkit"),
        ("13.0", True, False, "check the driver with nvidia-smi"),
    ],
)
def test_missing_parts_of_cuda_are_named(
    version: str | None,
    library: bool,
    driver: bool,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Any,
) -> None:
    monkeypatch.setattr(_extension, "UNAVAILABLE", None)
    monkeypatch.setattr(torch.version, "cuda", version)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: driver)
    file = tmp_path / "_cuda.so"
    monkeypatch.setattr(_extension, "_library", lambda name: file if library else None)
    reason = _extension.cuda_unavailable.__wrapped__()
    assert reason is not None
    assert expected in reason


def test_a_broken_library_of_cuda_kernels_is_a_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    file = tmp_path / "_cuda.so"
    file.write_bytes(b"not a library")
    monkeypatch.setattr(_extension, "UNAVAILABLE", None)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(_extension, "_library", lambda name: file)
    reason = _extension.cuda_unavailable.__wrapped__()
    assert reason is not None
    assert "_cuda.so does not load" in reason


def test_the_tables_cannot_be_made_inside_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    param = torch.nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    one = METHODS["sam"]([param], BASES["sgd"], rho=0.1)
    with pytest.raises(RuntimeError, match="make a whole step before the capture"):
        one.first_step(zero_grad=True)
    assert torch.equal(param, torch.ones(3))


@pytest.mark.parametrize("change", ["group", "checkpoint", "state"])
def test_what_a_graph_writes_to_outlives_the_tables_of_the_optimizer(change: str) -> None:
    params = parameters("unaligned", torch.float32)
    one = WSAM(params, AdamW, lr=0.1, rho=0.1)
    step(one, params, 0)
    engine = one._engine
    assert engine is not None
    table = engine.lists.lists[0].table
    assert table is not None
    table._rows[0]._captured.append(torch.zeros(0))  # as send() does in a capture
    addresses = weakref.ref(table.table)
    del engine, table
    if change == "group":
        other = torch.nn.Parameter(torch.ones(3))
        one.add_param_group({"params": [other]})
        params.append(other)
    elif change == "checkpoint":
        one.load_state_dict(one.state_dict())
    else:
        one.state.clear()
    step(one, params, 1)
    gc.collect()
    assert one._engine.lists.lists[0].table.table is not addresses()  # type: ignore[union-attr]
    assert addresses() is not None, "a replay would write to memory that others have"


def test_looking_at_the_state_makes_no_new_tables() -> None:
    """The state makes an entry for every parameter that it is asked for."""
    params = parameters("unaligned", torch.float32)
    params[1].requires_grad_(False)
    one = WSAM(params, AdamW, lr=0.1, rho=0.1)
    step(one, [params[0], *params[2:]], 0)
    engine = one._engine
    assert one.state[params[1]] == {}
    step(one, [params[0], *params[2:]], 1)
    assert one._engine is engine
    del one.state[params[0]]
    step(one, [params[0], *params[2:]], 2)
    assert one._engine is not engine
    assert float(one.state[params[0]]["step"]) == 1
