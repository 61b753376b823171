"""ESAM and RW-SAM: their steps on every backend, and what is special about each."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import BASES, FOREIGN_BASES, parameters
from comparison import compare_and_align
from conftest import ON_CPU
from per_sample_cases import METHODS, OPTIONS, Linear, Net
from tolerances import ONE_STEP, close
from torch import Tensor

from wsam_fused import ESAM, RWSAM, SAM

ALL_BASES = {**BASES, **FOREIGN_BASES}
EACH = pytest.mark.parametrize("method", METHODS)


def vector(*values: float) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.tensor(values, dtype=torch.float64))


# ---- both ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("base", ["sgd-l2", "sgdm", "nesterov", "adam", "adamw", "rmsprop"])
@EACH
@pytest.mark.parametrize("backend", [name for name in ON_CPU if name != "eager"])
def test_backends_agree_with_the_reference(
    backend: str, method: str, base: str, option: str, dtype: torch.dtype
) -> None:
    optimizers, losses = [], []
    for name in (backend, "eager"):
        torch.manual_seed(1)
        params = parameters("unaligned", dtype)
        losses.append(Linear(params))
        optimizers.append(METHODS[method](params, ALL_BASES[base], backend=name, **OPTIONS[option]))
    before = [param.detach().clone() for param in losses[0].params]
    for number in range(4):
        found = [one.step(each) for one, each in zip(optimizers, losses, strict=True)]
        close(*found, ONE_STEP[dtype], "loss")
        compare_and_align(*optimizers, dtype, f"step {number}")
    assert not any(torch.equal(p, w) for p, w in zip(losses[0].params, before, strict=True))


@EACH
def test_without_its_own_ingredient_it_is_sam(method: str, backend: str) -> None:
    neutral = {"esam": {"beta": 1.0, "gamma": 1.0}, "rwsam": {"lam": 0.0}}[method]
    nets = [Net(), Net()]
    nets[1].__dict__.update(copy.deepcopy(nets[0].__dict__))
    options = {"rho": 0.3, "backend": backend}
    ours = METHODS[method](nets[0].model.parameters(), BASES["adamw"], **neutral, **options)
    sam = SAM(nets[1].model.parameters(), BASES["adamw"], **options)

    def closure() -> Tensor:
        sam.zero_grad()
        loss = nets[1]().mean()
        loss.backward()
        return loss

    for _ in range(5):
        close(ours.step(nets[0]), sam.step(closure).detach(), ONE_STEP[torch.float64], "loss")
    for one, other in zip(nets[0].model.parameters(), nets[1].model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@EACH
def test_the_calls_say_what_to_call_instead(method: str) -> None:
    net = Net()
    optimizer = METHODS[method](net.model.parameters(), BASES["sgd"])
    for call in (optimizer.first_step, optimizer.second_step, optimizer.third_step):
        with pytest.raises(RuntimeError, match=rf"{call.__name__}\(\).* call step\(losses_fn\)"):
            call()
    for wrong in (None, [lambda: None], 3.0):
        with pytest.raises(TypeError, match=r"expected a function losses_fn\(index=None\)"):
            optimizer.step(wrong)


BAD: dict[str, tuple[Callable[[Tensor], Any], type[BaseException], str]] = {
    "scalar": (torch.mean, ValueError, r"the shape \[\], expected one loss per sample.*reduction"),
    "matrix": (lambda x: x[:, None], ValueError, r"the shape \[\d, 1\], expected one loss per"),
    "empty": (lambda x: x[:0], ValueError, r"the shape \[0\], expected one loss per sample"),
    "longer": (lambda x: torch.cat([x, x]), ValueError, r"returned \d+ losses for .*, expected \d"),
    "no tensor": (lambda x: x.tolist(), TypeError, "returned list, expected one loss per sample"),
    "integers": (lambda x: x.long(), TypeError, "a tensor of torch.int64, expected one loss"),
    "no graph": (torch.Tensor.detach, ValueError, "a tensor without graph"),
}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("evaluation", [1, 2, 3])
@EACH
def test_bad_losses_are_refused_and_nothing_is_lost(
    method: str, evaluation: int, bad: str, backend: str
) -> None:
    spoil, error, message = BAD[bad]
    net = Net()
    if bad == "longer" and evaluation == 1:
        if method == "esam":
            pytest.skip("the first evaluation says how many samples there are")
        evaluation = 2
    if bad == "no graph" and evaluation == (2 if method == "esam" else 1):
        pytest.skip("that evaluation needs no graph")
    if bad == "no graph" and method == "esam" and evaluation == 1:
        pytest.skip("ESAM tries again with all tensors: see below")
    check_failure(net, method, backend, evaluation, spoil, error, message)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("evaluation", [1, 2, 3])
@EACH
def test_an_exception_restores_everything(
    method: str, evaluation: int, error: type[BaseException], backend: str
) -> None:
    def spoil(losses: Tensor) -> Any:
        raise error("boom")

    check_failure(Net(), method, backend, evaluation, spoil, error, "boom")


def check_failure(
    net: Net,
    method: str,
    backend: str,
    evaluation: int,
    spoil: Callable[[Tensor], Any],
    error: type[BaseException],
    message: str,
) -> None:
    params = list(net.model.parameters())
    optimizer = METHODS[method](
        params, BASES["adamw"], rho=0.3, restore="backup", backend=backend, model=net.model
    )
    optimizer.step(net)
    before = copy.deepcopy([*params, optimizer.state_dict()])
    calls = 0

    def losses_fn(index: Tensor | None = None) -> Any:
        nonlocal calls
        calls += 1
        return spoil(net(index)) if calls == evaluation else net(index)

    with pytest.raises(error, match=message):
        optimizer.step(losses_fn)
    assert calls == evaluation
    assert not optimizer.is_perturbed
    assert all(param.requires_grad for param in params)
    assert all(torch.equal(p, w) for p, w in zip(params, before, strict=False))
    after = optimizer.state_dict()
    assert after["param_groups"] == before[-1]["param_groups"]
    for index, state in after["state"].items():
        for key, value in state.items():
            assert torch.equal(value, before[-1]["state"][index][key])
    optimizer.step(net)
    assert not torch.equal(params[0], before[0])


@EACH
def test_batch_norm_sees_the_unperturbed_batch_once(method: str, backend: str) -> None:
    net = Net()
    optimizer = METHODS[method](
        net.model.parameters(), BASES["sgd"], rho=5.0, backend=backend, model=net.model
    )
    norm = net.model[1]
    expected = 0.9 * norm.running_mean + 0.1 * net.model[0](net.x).mean(0).detach()
    optimizer.step(net)
    torch.testing.assert_close(norm.running_mean, expected)
    assert norm.num_batches_tracked == 1


@EACH
def test_a_checkpoint_goes_on_with_the_same_choices(method: str, backend: str) -> None:
    def train(steps: int, seed: int, saved: Any = None) -> tuple[Any, list[Tensor]]:
        torch.manual_seed(3)
        net = Net()
        options = {"rho": 0.3, "seed": seed, "backend": backend}
        optimizer = METHODS[method](net.model.parameters(), BASES["adamw"], **options)
        if saved is not None:
            net.model.load_state_dict(saved[0])
            optimizer.load_state_dict(saved[1])
        for _ in range(steps):
            optimizer.step(net)
        state = copy.deepcopy([net.model.state_dict(), optimizer.state_dict()])
        return state, [param.detach() for param in net.model.parameters()]

    whole = train(6, seed=5)[1]
    resumed = train(3, seed=5, saved=train(3, seed=5)[0])[1]
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))
    other = train(6, seed=6)[1]
    assert not any(torch.equal(a, b) for a, b in zip(whole, other, strict=True))


@EACH
def test_plain_steps_between(method: str, backend: str) -> None:
    params = parameters("unaligned", torch.float64)
    losses = Linear(params)
    optimizer = METHODS[method](params, BASES["sgd"], every=3, backend=backend)
    evaluations = []
    for _ in range(6):
        losses.calls.clear()
        optimizer.step(losses)
        evaluations.append(len(losses.calls))
        assert (optimizer.last.perturbed_loss is None) == (evaluations[-1] == 1)
    assert evaluations == [1, 1, 3, 1, 1, 3]


@EACH
def test_telemetry(method: str, backend: str) -> None:
    params = parameters("unaligned", torch.float64)
    losses = Linear(params)
    expected = losses().mean().item()
    optimizer = METHODS[method](params, BASES["sgd"], rho=0.5, backend=backend)
    assert optimizer.step(losses).item() == pytest.approx(expected)
    assert optimizer.last.loss.item() == pytest.approx(expected)
    assert optimizer.last.grad_norm > 0
    assert optimizer.last.second_grad_norm is None
    if method == "esam":  # along the gradient of the mean loss: rho / beta |g1|
        risen = 0.5 / 0.6 * optimizer.last.grad_norm.item()
        assert optimizer.last.sharpness.item() == pytest.approx(risen)


# ---- ESAM ----------------------------------------------------------------------------------------


def test_esam_by_hand(backend: str) -> None:
    # Losses 3 a + 4 b, 0, -a: mean slope (2/3, 4/3), norm sqrt(20)/3; e = (1, 2) / sqrt(5) at
    # rho 0.5, beta 0.5. Rises 11/sqrt(5), 0, -1/sqrt(5): round(0.5 * 3) = 2 samples, the first two.
    a, b = vector(1.0), vector(2.0)
    at_call = []

    def losses_fn(index: Tensor | None = None) -> Tensor:
        at_call.append((a.item(), b.item(), index))
        losses = torch.cat([3 * a + 4 * b, 0 * a, -a])
        return losses if index is None else losses[index]

    optimizer = ESAM([a, b], torch.optim.SGD, rho=0.5, beta=0.5, lr=0.1, backend=backend)
    optimizer.step(losses_fn)
    assert at_call[1][:2] == pytest.approx((1 + 5**-0.5, 2 + 2 * 5**-0.5))
    assert at_call[2][2].tolist() == [0, 1]
    assert at_call[2][2].dtype == torch.int64
    assert (a.item(), b.item()) == pytest.approx((1 - 0.1 * 1.5, 2 - 0.1 * 2.0))


@pytest.mark.parametrize(
    ("gamma", "count"), [(0.01, 1), (0.25, 2), (0.5, 3), (0.58, 3), (0.59, 4), (0.95, None)]
)
def test_esam_selects_the_samples_that_rise_most(gamma: float, count: int | None) -> None:
    params = parameters("unaligned", torch.float64)
    losses = Linear(params)
    optimizer = ESAM(params, torch.optim.SGD, beta=1.0, gamma=gamma, lr=0.1)
    slopes = [slope.flatten(1) for slope in losses.slopes]
    rises = torch.cat(slopes, 1) @ torch.cat([slope.mean(0) for slope in slopes])
    optimizer.step(losses)
    if count is None:  # all of them: there is nothing to look for
        assert losses.calls == [None, None]
    else:
        assert losses.calls[:2] == [None, None]
        expected = rises.argsort(descending=True)[:count].sort().values
        assert losses.calls[2].tolist() == expected.tolist()  # type: ignore[union-attr]


def perturbed_tensors(optimizer: Any, losses: Linear) -> list[bool]:
    """Make a step and say which tensors were somewhere else at the second evaluation."""
    before = [param.detach().clone() for param in losses.params]
    moved: list[bool] = []

    def losses_fn(index: Tensor | None = None) -> Tensor:
        pairs = zip(losses.params, before, strict=True)
        moved[:] = [not torch.equal(param, w) for param, w in pairs]
        return losses(index)

    optimizer.step(losses_fn)
    return moved


def test_esam_perturbs_all_tensors_first_and_then_a_share() -> None:
    params = [vector(1.0) for _ in range(40)]
    optimizer = ESAM(params, torch.optim.SGD, beta=0.3, lr=0.0)
    found = [perturbed_tensors(optimizer, Linear(params)) for _ in range(50)]
    assert all(found[0])
    active = sum(map(sum, found[1:]))
    # 49 * 40 draws: 588 expected, standard deviation 20.
    assert 588 - 100 < active < 588 + 100
    assert found[1] != found[2]
    assert all(param.requires_grad for param in params)


def test_esam_always_perturbs_something() -> None:
    params = [vector(1.0) for _ in range(2)]
    optimizer = ESAM(params, torch.optim.SGD, beta=0.01, lr=0.0)
    found = [sum(perturbed_tensors(optimizer, Linear(params))) for _ in range(20)]
    assert found[0] == 2
    assert all(count == 1 for count in found[1:])


def test_esam_groups_have_their_own_share() -> None:
    groups = [
        {"params": [vector(1.0) for _ in range(10)], "beta": 1.0},
        {"params": [vector(1.0) for _ in range(10)], "beta": 1e-9},
    ]
    params = [param for group in groups for param in group["params"]]  # type: ignore[attr-defined]
    optimizer = ESAM(groups, torch.optim.SGD, lr=0.0)
    perturbed_tensors(optimizer, Linear(params))
    assert perturbed_tensors(optimizer, Linear(params)) == [True] * 10 + [False] * 10


def test_esam_makes_no_weight_gradients_for_inactive_tensors() -> None:
    params = [vector(1.0) for _ in range(20)]
    optimizer = ESAM(params, torch.optim.SGD, beta=0.5, lr=0.1)
    optimizer.step(Linear(params))
    required: list[list[bool]] = []

    def losses_fn(index: Tensor | None = None) -> Tensor:
        required.append([param.requires_grad for param in params])
        return Linear(params)(index)

    before = [param.item() for param in params]
    optimizer.step(losses_fn)
    assert 0 < sum(required[0]) < 20
    assert all(required[1])
    assert all(required[2])
    assert all(param.item() != w for param, w in zip(params, before, strict=True))


def test_esam_takes_all_tensors_where_the_active_ones_have_no_part_in_the_loss() -> None:
    used, unused = vector(1.0), vector(1.0)
    optimizer = ESAM([used, unused], torch.optim.SGD, beta=0.01, lr=0.1)
    losses = Linear([used])
    for _ in range(20):
        before = used.item()
        optimizer.step(losses)
        assert used.item() != before
    assert unused.item() == 1.0
    assert len(losses.calls) > 60  # it happened


def test_esam_refuses_losses_without_graph() -> None:
    params = [vector(1.0), vector(2.0)]
    optimizer = ESAM(params, torch.optim.SGD, lr=0.1)
    losses = Linear(params)
    optimizer.step(losses)
    before = [param.item() for param in params]
    with pytest.raises(ValueError, match="a tensor without graph"):
        optimizer.step(lambda index=None: losses(index).detach())
    assert [param.item() for param in params] == before
    assert all(param.requires_grad for param in params)


def test_esam_leaves_frozen_parameters_frozen() -> None:
    frozen, free = vector(1.0), vector(1.0)
    frozen.requires_grad_(False)
    optimizer = ESAM([frozen, free], torch.optim.SGD, beta=0.5, lr=0.1)
    for _ in range(3):
        optimizer.step(Linear([frozen, free]))
    assert not frozen.requires_grad
    assert frozen.item() == 1.0


def test_esam_compares_losses_of_the_same_dropout_masks() -> None:
    net = Net(dropout=0.5)
    optimizer = ESAM(net.model.parameters(), torch.optim.SGD, rho=1e-9, lr=0.1)
    optimizer.step(net)
    # Of 6 samples with other masks the mean loss would change by more than 1e-9 or so.
    assert abs(optimizer.last.sharpness) < 1e-6


# ---- RW-SAM --------------------------------------------------------------------------------------


def test_rwsam_by_hand(backend: str) -> None:
    # Losses 3 w and w at w = 2: |l' - l| / delta is 3 and 1 for either sign. lam = log(3) / 2:
    # weights 3/4 and 1/4. g1 > 0, so e = rho = 0.5, and g2 = 2 w for the square that is there too.
    w = vector(2.0)
    slopes = torch.tensor([3.0, 1.0], dtype=torch.float64)
    points, grads = [], []
    w.register_hook(grads.append)

    def losses_fn(index: Tensor | None = None) -> Tensor:
        points.append(w.item())
        return slopes * w

    optimizer = RWSAM(
        [w],
        torch.optim.SGD,
        rho=0.5,
        lam=torch.log(torch.tensor(3.0, dtype=torch.float64)).item() / 2,
        delta=0.25,
        lr=0.1,
        backend=backend,
    )
    loss = optimizer.step(losses_fn)
    assert points[0] in (1.75, 2.25)
    assert points[1:] == pytest.approx([2.0, 2.5])
    assert [grad.item() for grad in grads] == pytest.approx([0.75 * 3 + 0.25, 2.0])
    assert w.item() == pytest.approx(2.0 - 0.1 * 2.0)
    assert loss.item() == pytest.approx(4.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
def test_rwsam_probes_along_signs_and_returns_exactly(dtype: torch.dtype, backend: str) -> None:
    params = parameters("sizes", dtype)
    optimizer = RWSAM(params, BASES["sgd"], delta=2.0**-8, backend=backend)
    losses = Linear(params)
    signs = []
    for _ in range(2):
        before = [param.detach().clone() for param in params]
        points: list[list[Tensor]] = []

        def losses_fn(index: Tensor | None = None, points: list[list[Tensor]] = points) -> Tensor:
            points.append([param.detach().clone() for param in params])
            return losses(index)

        optimizer.step(losses_fn)
        assert all(torch.equal(p, w) for p, w in zip(points[1], before, strict=True))
        moves = [p.double() - w.double() for p, w in zip(points[0], before, strict=True)]
        flat = torch.cat([move.flatten() for move in moves])
        unit = torch.finfo(dtype).eps * 8
        assert ((flat.abs() - 2.0**-8).abs() <= unit).all()
        signs.append(flat > 0)
    shares = [sign.double().mean().item() for sign in signs]
    count = signs[0].numel()
    assert all(abs(share - 0.5) < 4 * 0.5 / count**0.5 for share in shares)
    assert 0.45 < (signs[0] == signs[1]).double().mean() < 0.55  # new signs in every step


def test_rwsam_weighs_by_norms_that_are_right_on_average() -> None:
    params = [torch.nn.Parameter(torch.randn(50, dtype=torch.float64)) for _ in range(4)]
    losses = Linear(params)
    optimizer = RWSAM(params, torch.optim.SGD, lr=0.0, seed=1)
    squares = []
    for _ in range(400):
        probed = optimizer._probe(losses)
        squares.append(((probed - losses().detach()) / 1e-3) ** 2)
        optimizer.param_groups[0]["sam_step"] += 1
    expected = sum(slope.flatten(1).square().sum(1) for slope in losses.slopes)
    found = torch.stack(squares).mean(0)
    # The square of a sum of signs has a standard deviation of sqrt(2) times its mean.
    torch.testing.assert_close(found, expected, rtol=4 * (2 / 400) ** 0.5, atol=0.0)


def test_rwsam_compares_losses_of_the_same_dropout_masks_and_draws_no_more() -> None:
    net = Net(dropout=0.5)
    optimizer = RWSAM(net.model.parameters(), torch.optim.SGD, delta=1e-7, lr=0.1)
    state = torch.get_rng_state()
    probed = optimizer._probe(net)
    assert torch.equal(torch.get_rng_state(), state)
    assert ((net().detach() - probed).abs() < 1e-4).all()


@pytest.mark.parametrize("lam", [1.0, 1e6])
def test_rwsam_with_large_exponents_is_finite(lam: float, backend: str) -> None:
    params = parameters("unaligned", torch.float32)
    optimizer = RWSAM(params, BASES["sgd"], lam=lam, backend=backend)
    optimizer.step(Linear(params))
    assert optimizer.skipped_steps == 0
    assert all(param.isfinite().all() for param in params)


def test_rwsam_with_an_infinite_loss_skips_the_step(backend: str) -> None:
    params = parameters("unaligned", torch.float32)
    optimizer = RWSAM(params, BASES["adamw"], restore="backup", backend=backend)
    losses = Linear(params)
    optimizer.step(losses)
    before = [param.detach().clone() for param in params]
    optimizer.step(lambda index=None: losses(index) + torch.tensor([0.0] * 5 + [float("inf")]))
    assert optimizer.skipped_steps == 1
    assert all(torch.equal(p, w) for p, w in zip(params, before, strict=True))


def test_rwsam_refuses_what_has_too_few_bits() -> None:
    low = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r"a parameter is torch\.bfloat16, too coarse"):
        RWSAM([low], torch.optim.SGD, lr=0.1)
    params = parameters("unaligned", torch.float32)
    losses = Linear(params)
    optimizer = RWSAM(params, torch.optim.SGD, lr=0.1)
    with pytest.raises(ValueError, match=r"returned torch\.bfloat16, too coarse"):
        optimizer.step(lambda index=None: losses(index).bfloat16())
    assert not optimizer.is_perturbed


@pytest.mark.parametrize(
    ("method", "arguments", "error", "message"),
    [
        (ESAM, {"beta": 0.0}, ValueError, r"beta is 0.0, expected a number in \(0, 1\]"),
        (ESAM, {"beta": 1.1}, ValueError, r"beta is 1.1, expected a number in \(0, 1\]"),
        (ESAM, {"gamma": 0.0}, ValueError, r"gamma is 0.0, expected a number in \(0, 1\]"),
        (ESAM, {"gamma": 2}, ValueError, r"gamma is 2.0, expected a number in \(0, 1\]"),
        (ESAM, {"seed": -1}, ValueError, r"seed is -1, expected a whole number >= 0"),
        (ESAM, {"seed": 0.5}, TypeError, r"seed is 0.5, expected a whole number >= 0"),
        (ESAM, {"maximize": True}, ValueError, "maximize is True.*negate the losses"),
        (ESAM, {"only_weights": True}, ValueError, "needs the parameters' names"),
        (RWSAM, {"lam": -1.0}, ValueError, r"lam is -1.0, expected a number >= 0"),
        (RWSAM, {"delta": 0.0}, ValueError, r"delta is 0.0, expected a number > 0"),
        (RWSAM, {"delta": float("nan")}, ValueError, r"delta is nan, expected a number > 0"),
    ],
)
def test_bad_arguments(
    method: Any, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        method([vector(1.0)], torch.optim.SGD, lr=0.1, **arguments)
