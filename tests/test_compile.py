"""torch.compile: a compiled model beside the same run uncompiled; nothing is compiled again.

Every step starts from the same weights and state (``compare_and_align``). Gradients of a compiled
model may be rounded otherwise, which in float64 stays within the tolerance of one step.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import BASES, METHODS
from comparison import compare_and_align
from tolerances import ONE_STEP, close
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from wsam_fused import SAM, WSAM

# Of torch's own code, while Inductor is imported.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")

INDUCTOR = pytest.param(
    "inductor",
    marks=pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs g++"),
)
F64 = torch.float64
F32 = torch.float32


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """Nothing compiled before; Inductor in this process, so that no worker outlives the test."""
    torch._dynamo.reset()
    counters.clear()
    # Quicker to compile: the compiler is not asked for instruction sets and headers.
    quick = {"cpp.simdlen": 1, "cpp_cache_precompile_headers": False}
    with torch._inductor.config.patch(compile_threads=1, **quick):
        yield
    torch._dynamo.reset()


class Run:
    """A model and its optimizer, the model compiled or not."""

    def __init__(
        self,
        method: str = "wsam",
        base: str = "adamw",
        *,
        compiler: Any = None,
        dtype: torch.dtype = F64,
        layers: Callable[[], nn.Sequential] | None = None,
        frozen: tuple[str, ...] = (),
        autocast: bool = False,
        **options: Any,
    ) -> None:
        torch.manual_seed(0)
        self.model = (layers or perceptron)().to(dtype)
        for name in frozen:
            self.model.get_parameter(name).requires_grad_(False)
        self.x = torch.randn(6, 4, dtype=dtype)
        self.y = torch.randn(6, 3, dtype=dtype)
        self.autocast = autocast
        self.network: nn.Module = self.model
        if compiler is not None:
            compiled = torch.compile(self.model, backend=compiler, fullgraph=True)
            assert isinstance(compiled, nn.Module)
            self.network = compiled
        options = {"rho": 0.1, **options}
        # Parameters and `model` of the compiled module, which are those of the other.
        if options.pop("freeze_statistics", False):
            options["model"] = self.network
        self.optimizer = METHODS[method](self.network.parameters(), BASES[base], **options)

    def loss(self, rows: slice = slice(None)) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            output = self.network(self.x[rows])
        return nn.functional.mse_loss(output.to(self.y.dtype), self.y[rows])

    def evaluate(self, rows: slice = slice(None)) -> Tensor:
        loss = self.loss(rows)
        loss.backward()
        return loss

    def closure(self) -> Tensor:
        self.optimizer.zero_grad()
        return self.evaluate()

    def step(self, form: str, number: int) -> None:
        self.x += 0.1
        for group in self.optimizer.param_groups:
            group["lr"] = 0.01 / (1 + number)
        if form == "closure":
            self.optimizer.step(self.closure)
        elif form == "micro-batches":
            rows = (slice(0, 3), slice(3, 6))
            self.optimizer.step([functools.partial(self.evaluate, one) for one in rows])
        else:
            for call in (self.optimizer.first_step, self.optimizer.second_step):
                self.evaluate()
                call(zero_grad=True)


def perceptron() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def normalized() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))


def dropping() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.5), nn.Linear(64, 3))


def compare(form: str, backend: str, dtype: torch.dtype = F64, **kw: Any) -> Run:
    """Step compiled and uncompiled; one graph is made in the first step, and none later."""
    counter = CompileCounterWithBackend(backend)
    compiled, plain = Run(compiler=counter, dtype=dtype, **kw), Run(dtype=dtype, **kw)
    before = [param.detach().clone() for param in compiled.model.parameters()]
    for number in range(4):
        compiled.step(form, number)
        plain.step(form, number)
        compare_and_align(compiled.optimizer, plain.optimizer, dtype, f"step {number}")
        assert counter.frame_count == counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    frozen = kw.get("frozen", ())
    for (name, param), w in zip(compiled.model.named_parameters(), before, strict=True):
        assert torch.equal(param, w) == (name in frozen)
    return compiled


@pytest.mark.parametrize("form", ["closure", "calls", "micro-batches"])
@pytest.mark.parametrize("base", ["sgdm", "adamw"])
@pytest.mark.parametrize("method", ["sam", "wsam", "gsam"])
def test_a_compiled_model_is_compiled_once(method: str, base: str, form: str) -> None:
    compare(form, "aot_eager", method=method, base=base)


@pytest.mark.parametrize("backend", [INDUCTOR])
@pytest.mark.parametrize(
    ("method", "base", "form"), [("wsam", "adamw", "closure"), ("gsam", "sgdm", "calls")]
)
def test_with_inductor(method: str, base: str, form: str, backend: str) -> None:
    compare(form, backend, method=method, base=base)


@pytest.mark.parametrize("form", ["closure", "calls"])
def test_frozen_parameters(form: str) -> None:
    run = compare(form, "aot_eager", frozen=("0.weight", "2.bias"))
    assert run.model.get_parameter("0.weight").grad is None


@pytest.mark.parametrize("form", ["closure", "calls"])
def test_autocast(form: str) -> None:
    """Casts of weights are made anew at the perturbed ones; both runs round alike."""
    compare(form, "aot_eager", F32, autocast=True)


@pytest.mark.parametrize("form", ["closure", "calls", "micro-batches"])
def test_batch_norm_of_a_compiled_model(form: str) -> None:
    run = compare(form, "aot_eager", layers=normalized, frozen=("0.bias",), freeze_statistics=True)
    evaluations = 8 if form == "micro-batches" else 4  # of them at w
    assert run.model.get_buffer("1.num_batches_tracked") == evaluations


@pytest.mark.parametrize("backend", ["aot_eager", INDUCTOR])
@pytest.mark.parametrize("replay_rng", [False, True])
def test_dropout_of_a_compiled_model(replay_rng: bool, backend: str) -> None:
    """At the same weights, losses are equal if and only if the masks are."""
    run = Run(compiler=backend, layers=dropping, rho=0.0, replay_rng=replay_rng)
    losses = []
    for _ in range(3):
        run.optimizer.step(run.closure)
        last = run.optimizer.last
        assert torch.equal(last.loss, last.perturbed_loss) == replay_rng
        losses.append(last.loss.item())
    assert len(set(losses)) == 3


@pytest.mark.parametrize("compile_model", [False, True])
@pytest.mark.parametrize("form", ["closure", "calls", "micro-batches"])
def test_a_compiled_function_around_a_step(form: str, compile_model: bool) -> None:
    """The graph breaks there, and what is compiled besides is compiled once."""
    inner = CompileCounterWithBackend("aot_eager") if compile_model else None
    compiled, plain = Run(compiler=inner), Run()

    @torch.compile(backend="aot_eager")
    def train(x: Tensor, number: int) -> Tensor:
        y = (x * 2).sum()
        compiled.step(form, number)
        return y + 1

    graphs = []
    for number in range(6):
        x = torch.full((3,), float(number))
        assert train(x, number) == 6 * number + 1
        plain.step(form, number)
        compare_and_align(compiled.optimizer, plain.optimizer, F64, f"step {number}")
        graphs.append(counters["stats"]["unique_graphs"])
    # `number` becomes a symbol when it is seen to change.
    assert len(set(graphs[2:])) == 1
    assert counters["graph_break"]
    if inner is not None:  # call by call, the outer function takes the model over
        assert inner.frame_count == (0 if form == "calls" else 1)


@pytest.mark.parametrize("method", ["wsam", "bsam"])
def test_a_compiled_step_is_run_as_it_is(method: str) -> None:
    runs = [Run(method), Run(method)]
    for number in range(3):
        for run, step in zip(
            runs, (torch.compile(runs[0].optimizer.step), runs[1].optimizer.step), strict=True
        ):
            run.x += number
            step(run.closure)
        compare_and_align(runs[0].optimizer, runs[1].optimizer, F64, f"step {number}")
    assert not counters["stats"]["unique_graphs"]


def test_blocks_of_the_same_randomness_in_a_compiled_function() -> None:
    run = Run(layers=dropping, replay_rng=True, rho=0.0)
    losses = []

    @torch.compile(backend="aot_eager")
    def train() -> None:
        for call in (run.optimizer.first_step, run.optimizer.second_step):
            with run.optimizer.same_randomness():
                losses.append(run.evaluate())
            call(zero_grad=True)

    for _ in range(2):
        train()
    assert torch.equal(losses[0], losses[1])
    assert torch.equal(losses[2], losses[3])
    assert not torch.equal(losses[1], losses[2])


def test_an_exception_in_a_compiled_function_restores_the_weights() -> None:
    run = Run("sam", restore="backup")
    before = [param.detach().clone() for param in run.model.parameters()]
    calls = 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise ValueError("boom")
        return run.closure()

    @torch.compile(backend="aot_eager")
    def train() -> Any:
        return run.optimizer.step(closure)

    with pytest.raises(ValueError, match="boom"):
        train()
    assert not run.optimizer.is_perturbed
    assert all(
        torch.equal(param, w) for param, w in zip(run.model.parameters(), before, strict=True)
    )
    train()
    assert not torch.equal(next(run.model.parameters()), before[0])


def test_hooks_and_schedulers_see_steps_once() -> None:
    """Both wrap `step`, inside of and around what keeps it from being traced."""
    run = Run()
    seen = []
    run.optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    run.optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    scheduler = torch.optim.lr_scheduler.StepLR(run.optimizer, 1)
    for _ in range(2):
        run.optimizer.step(run.closure)
        scheduler.step()
    assert seen == ["before", "after"] * 2
    assert scheduler.get_last_lr()[0] == pytest.approx(1e-4)


def test_subclasses_are_run_as_they_are_too() -> None:
    class Counting(SAM):
        steps = 0

        def step(self, closure: Any = None) -> Any:
            self.steps += 1
            return super().step(closure)

    weight = nn.Parameter(torch.ones(3))
    optimizer = Counting([weight], torch.optim.SGD, lr=0.1)
    plain = WSAM([nn.Parameter(torch.ones(3))], torch.optim.SGD, lr=0.1, gamma=0.5, decouple=False)

    def closure_of(one: Any) -> Callable[[], Tensor]:
        def closure() -> Tensor:
            one.zero_grad()
            loss = one.param_groups[0]["params"][0].square().sum()
            loss.backward()
            return loss

        return closure

    @torch.compile(backend="aot_eager")
    def train() -> Any:
        return optimizer.step(closure_of(optimizer))

    for _ in range(2):
        train()
        plain.step(closure_of(plain))
    assert optimizer.steps == 2
    assert not counters["stats"]["unique_graphs"]
    expected = plain.param_groups[0]["params"][0].detach()
    close(weight.detach(), expected, ONE_STEP[F32], "the weight")
