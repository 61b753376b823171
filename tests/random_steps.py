"""Random lists, gradients, methods and options, and steps of a backend beside the oracle.

The tolerances of tolerances.py hold for values of the size of 1, weights of gradients up to 35 in
all, and |e| < 1: what is drawn stays within that.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from typing import Any, NamedTuple

import torch
from cases import KEEPING, METHODS, call
from hypothesis import strategies as st
from tolerances import ONE_STEP, PERTURBED, REDUCTION, close
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, RMSprop

from wsam_fused.backends import BACKENDS

counts: Counter[str] = Counter()

LOW = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, torch.float64, *LOW)
SIZES = (0, 1, 2, 3, 5, 7, 8, 17, 33, 64, 65)


class Spec(NamedTuple):
    """A parameter: shape, how it lies in memory, dtype, and the kinds of its gradients."""

    shape: tuple[int, ...]
    layout: str
    dtype: torch.dtype
    kinds: tuple[str, str, str]


class Case(NamedTuple):
    """A list of parameters and how it is stepped.

    Attributes:
        specs: The parameters.
        method: A name of ``METHODS``.
        base: The base optimizer.
        options: Of the optimizer.
        seed: Of all values.
        poisoned: The evaluation with a gradient that is not finite, or -1.
    """

    specs: tuple[Spec, ...]
    method: str
    base: Any
    options: dict[str, Any]
    seed: int
    poisoned: int


small = st.lists(st.sampled_from(SIZES), max_size=3).map(tuple).filter(lambda s: math.prod(s) < 999)
pictures = st.tuples(*[st.integers(1, 4)] * 4)
usual = ("usual",) * 5
specs = st.builds(
    Spec,
    shape=st.one_of(small, small, pictures),
    layout=st.sampled_from(
        ["contiguous", "contiguous", "transposed", "channels-last", "unaligned", "sliced"]
    ),
    dtype=st.just(torch.float32),
    kinds=st.tuples(
        *[st.sampled_from([*usual, "expanded", "strided", "view", "zero", "missing"])] * 3
    ),
)
plain = ("usual", "usual", "usual")
large = st.builds(
    lambda size: (Spec((size,), "contiguous", torch.float32, plain),),
    st.sampled_from([16_383, 16_385, 40_001]),
)
tiny = st.builds(
    lambda count: tuple(
        Spec((1 + i % 5,), "contiguous", torch.float32, plain) for i in range(count)
    ),
    st.integers(50, 300),
)
few = st.lists(specs, min_size=1, max_size=6).map(tuple)
# With Adam's eps of 1e-8 the first update of an h that cancels is its sign, that of a rounding.
bases = st.one_of(
    st.builds(
        functools.partial,
        st.just(SGD),
        lr=st.floats(0.001, 0.1),
        weight_decay=st.sampled_from([0.0, 0.01]),
        momentum=st.sampled_from([0.0, 0.5, 0.9]),
        maximize=st.booleans(),
    ),
    st.just(functools.partial(SGD, lr=0.05, momentum=0.9, nesterov=True)),
    st.just(functools.partial(SGD, lr=0.05, momentum=0.9, dampening=0.3)),
    st.builds(
        functools.partial,
        st.sampled_from([Adam, AdamW]),
        lr=st.floats(0.001, 0.01),
        betas=st.tuples(st.floats(0.5, 0.9), st.floats(0.9, 0.99)),
        eps=st.just(1e-3),
        weight_decay=st.sampled_from([0.0, 0.1]),
        amsgrad=st.booleans(),
        maximize=st.booleans(),
    ),
    st.just(functools.partial(RMSprop, lr=0.01, eps=1e-3)),
)
geometries = st.one_of(
    st.fixed_dictionaries({"rho": st.floats(0.0, 0.9)}),
    st.fixed_dictionaries(
        {
            "rho": st.floats(0.0, 0.2),
            "geometry": st.just("adaptive"),
            "eta": st.sampled_from([0.0, 0.05]),
        }
    ),
    st.fixed_dictionaries(
        {"rho": st.floats(0.0, 0.9), "geometry": st.just("fisher"), "eta": st.floats(0.0, 2.0)}
    ),
)
others = st.fixed_dictionaries(
    {},
    optional={
        "restore": st.sampled_from(["recompute", "backup"]),
        "max_grad_norm": st.sampled_from([0.5, 100.0]),
        "check_finite": st.booleans(),
    },
)
keepings = st.sampled_from([{}, *KEEPING.values()])


@st.composite
def cases(draw: st.DrawFn, lists: st.SearchStrategy[Any] = few) -> Case:
    """Draw a case; what does not go together is left out."""
    base, options = draw(bases), {**draw(geometries), **draw(others)}
    dtypes = draw(st.lists(st.sampled_from(DTYPES), min_size=1, max_size=2))
    found = tuple(
        spec._replace(dtype=dtypes[i % len(dtypes)]) for i, spec in enumerate(draw(lists))
    )
    if base.func is RMSprop:  # it squares what has been rounded to 16 bits for it
        dtypes = [torch.float64 if dtype in LOW else dtype for dtype in dtypes]
        found = tuple(spec._replace(dtype=dtypes[i % len(dtypes)]) for i, spec in enumerate(found))
    keeping = draw(keepings)
    chance = keeping.get("stochastic_rounding", False)
    if base.func is not RMSprop and not (chance and torch.float16 in dtypes):
        options.update(keeping)
    checks = options.get("check_finite") or "max_grad_norm" in options
    poisoned = draw(st.sampled_from([-1, -1, -1, 0, 1 if checks else 0]))
    return Case(
        found,
        draw(st.sampled_from(sorted(METHODS))),
        base,
        options,
        draw(st.integers(0, 2**20)),
        poisoned,
    )


# ---- making them ---------------------------------------------------------------------------------


def tensor_of(spec: Spec, generator: torch.Generator) -> Tensor:
    """Make the values of a parameter, in its layout."""
    values = torch.randn(spec.shape, generator=generator, dtype=torch.float64).to(spec.dtype)
    if spec.layout == "transposed" and values.dim() > 1:
        return values.transpose(0, -1).contiguous().transpose(0, -1)
    if spec.layout == "channels-last" and values.dim() == 4:
        return values.to(memory_format=torch.channels_last)
    if spec.layout == "unaligned":
        block = torch.zeros(values.numel() + 3, dtype=spec.dtype)
        return block[1 : 1 + values.numel()].view(spec.shape).copy_(values)
    if spec.layout == "sliced" and values.dim():  # not a dense block: stepped by the oracle
        return torch.stack([values, values], -1)[..., 0]
    return values


def gradient_of(param: Tensor, kind: str, generator: torch.Generator) -> Tensor | None:
    """Make a gradient of a kind."""
    values = torch.randn(param.shape, generator=generator, dtype=torch.float64).to(param.dtype)
    if kind == "expanded" and values.numel():
        return values.reshape(-1)[0].expand(param.shape)
    if kind == "strided" and values.dim():
        return torch.stack([values, values], -1)[..., 0]
    if kind == "view":
        return torch.cat([values.reshape(-1)] * 2)[: values.numel()].view(param.shape)
    if kind == "missing":
        return None
    return torch.zeros_like(values) if kind == "zero" else values


def _set_gradients(case: Case, params: list[torch.nn.Parameter], seed: int, k: int) -> bool:
    """Give the gradients of an evaluation; return whether there is any."""
    generator = torch.Generator().manual_seed(seed)
    for param, spec in zip(params, case.specs, strict=True):
        param.grad = gradient_of(param, spec.kinds[k], generator)
    found = [param for param in params if param.grad is not None]
    if k == case.poisoned and found:
        grad = found[seed % len(found)].grad
        assert grad is not None
        poisoned = grad.clone()
        if poisoned.numel():
            poisoned[(0,) * poisoned.dim()] = float("nan") if seed % 2 else float("inf")
        found[seed % len(found)].grad = poisoned
    return bool(found)


# ---- comparing -----------------------------------------------------------------------------------


def check(case: Case, backend: str, steps: int = 2) -> None:
    """Step a case with a backend and with the oracle, and compare at every point.

    Raises:
        AssertionError: They differ.
    """
    counts["cases"] += 1
    pairs = []
    for name in (backend, "eager"):
        generator = torch.Generator().manual_seed(case.seed)
        params = [torch.nn.Parameter(tensor_of(spec, generator)) for spec in case.specs]
        pairs.append(
            (METHODS[case.method](params, case.base, backend=name, **case.options), params)
        )
    (ours, mine), (oracle, known) = pairs
    for number in range(steps):
        for k in range(ours.evaluations):
            given = [_set_gradients(case, p, case.seed + 7 * number + k, k) for _, p in pairs]
            if not any(given) and k == 0:
                return
            for optimizer, _ in pairs:
                call(optimizer, k)
            what = f"step {number}, evaluation {k}"
            if k == 0:
                _compare_norms(ours, oracle, what)
            last = k == ours.evaluations - 1
            for i, (a, b) in enumerate(zip(mine, known, strict=True)):
                table = ONE_STEP if last else PERTURBED
                close(a.detach(), b.detach(), table[a.dtype], f"{what}, parameter {i}")
        _compare_states(ours, oracle, mine, known, f"step {number}")
    assert int(ours.skipped_steps) == int(oracle.skipped_steps)


def _compare_norms(ours: Any, oracle: Any, what: str) -> None:
    sums = [one._engine.scalars[:2] for one in (ours, oracle)]
    finite = bool(sums[1].isfinite().all())
    assert finite == bool(sums[0].isfinite().all()), what
    if finite:
        close(*sums, REDUCTION[torch.float64], f"{what}, norms")


def _compare_states(ours: Any, oracle: Any, mine: list[Any], known: list[Any], what: str) -> None:
    """Compare the states; then start the next step from the same values."""
    with torch.no_grad():
        for i, (a, b) in enumerate(zip(mine, known, strict=True)):
            a.copy_(b)
            state, expected = ours.state.get(a, {}), oracle.state.get(b, {})
            assert state.keys() == expected.keys(), f"{what}, state {i}"
            for key, value in state.items():
                if isinstance(value, Tensor):
                    tolerance = ONE_STEP[value.dtype]
                    close(value, expected[key], tolerance, f"{what}, {key} {i}")
                    value.copy_(expected[key])


def backends_to_compare(names: list[str]) -> list[str]:
    """Return those of ``names`` that are not the oracle."""
    return [name for name in names if BACKENDS[name] is not BACKENDS["eager"]]
