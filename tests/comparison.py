"""Steps of a backend beside steps of the reference.

Both start every step from the same state, so that differences do not pile up: after a comparison
the reference's tensors are copied over.
"""

from __future__ import annotations

from typing import Any

import torch
from cases import call, device_of, parameters, seed_of, set_gradients
from differences import note_step
from tolerances import ONE_STEP, PERTURBED, REDUCTION, close

STEPS = 4
GradientDtypes = tuple[torch.dtype | None, torch.dtype | None]


def compare_and_align(ours: Any, reference: Any, dtype: torch.dtype, what: str) -> None:
    """Compare parameters and states, which may be on different devices."""
    note_step(ours, all_params(ours), all_params(reference))
    pairs = zip(all_params(ours), all_params(reference), strict=True)
    for i, (param, expected) in enumerate(pairs):
        close(
            param.detach().cpu(), expected.detach().cpu(), ONE_STEP[dtype], f"{what}, parameter {i}"
        )
        state, expected_state = ours.state[param], reference.state[expected]
        assert state.keys() == expected_state.keys()
        with torch.no_grad():
            param.copy_(expected)
            for key, value in state.items():
                if isinstance(value, torch.Tensor):
                    where = f"{what}, {key} {i}"
                    close(value.cpu(), expected_state[key].cpu(), ONE_STEP[value.dtype], where)
                    value.copy_(expected_state[key])


def step_both(
    ours: Any,
    reference: Any,
    dtype: torch.dtype,
    number: int,
    dtypes: GradientDtypes = (None, None),
) -> None:
    """Make a step with given gradients; compare at every point and at the end.

    ``dtypes`` are those of g1 and of the other gradients.
    """
    what = f"step {number}"
    pairs = [(one, all_params(one)) for one in (ours, reference)]
    for evaluation in range(ours.evaluations):
        for optimizer, params in pairs:
            set_gradients(params, seed_of(number, evaluation), dtypes[min(evaluation, 1)])
            call(optimizer, evaluation)
        if evaluation == 0:  # norms, which no comparison after the restore would show
            sums = [one._engine.scalars[:2].cpu() for one in (ours, reference)]
            close(*sums, REDUCTION[torch.float64], f"{what}, norms")
        if evaluation < ours.evaluations - 1:
            point = ("ascent", "descent")[evaluation]
            for i, (param, expected) in enumerate(zip(pairs[0][1], pairs[1][1], strict=True)):
                where = f"{what}, parameter {i} at the {point} point"
                close(param.detach().cpu(), expected.detach().cpu(), PERTURBED[dtype], where)
    compare_and_align(ours, reference, dtype, what)


def all_params(optimizer: Any) -> list[torch.nn.Parameter]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def run_both(
    method: Any,
    base: Any,
    layout: str,
    dtype: torch.dtype,
    backend: str,
    gradient_dtypes: GradientDtypes = (None, None),
    **kw: Any,
) -> None:
    """Make steps with a backend and with the reference and compare parameters and states."""
    lists = []
    for _ in range(2):
        torch.manual_seed(1)
        lists.append(parameters(layout, dtype, device_of(backend)))
    ours = method(lists[0], base, backend=backend, **kw)
    reference = method(lists[1], base, backend="eager", **kw)
    before = [param.detach().clone() for param in lists[0]]
    for number in range(STEPS):
        step_both(ours, reference, dtype, number, gradient_dtypes)
    # A single number of low precision may round back to what it was.
    least = 1 if dtype in (torch.float32, torch.float64) else 5
    pairs = zip(lists[0], before, strict=True)
    moved = [not torch.equal(param, w) for param, w in pairs if param.numel() >= least]
    assert all(moved), "the comparison would pass by doing nothing"
