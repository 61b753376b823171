"""Random calls of the compiled reader of gradients, with objects that are not what it expects.

The three addresses that it is given are right in all of them: they cannot be checked.
"""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

from wsam_fused import _extension
from wsam_fused.gradients import _METHODS, _NAMES

MARK = 0x5A5A5A5A5A5A5A5A


class _Raises:
    """Has no attribute that can be read."""

    def __getattr__(self, name: str) -> Any:
        raise ValueError(name)


def check_reader(seed: int) -> bool:
    """Make one call; return whether it read the gradients.

    Raises:
        AssertionError: It did what it should not.
    """
    assert _extension.READ_GRADIENTS is not None
    rng = random.Random(seed)
    params = [_parameter(rng) for _ in range(rng.randint(0, 5))]
    count = len(params)
    table = torch.full((3, count + 2), MARK)
    table[0, 1:-1] = torch.tensor([param.data_ptr() for param in params], dtype=torch.int64)
    table[1, 1:-1] = torch.tensor([param.numel() for param in params], dtype=torch.int64)
    take = rng.random() < 0.5
    arguments: list[Any] = [params, torch.float32, _NAMES, _METHODS, -1]
    arguments += [table[row, 1:].data_ptr() for row in range(3)]
    arguments.append(take)
    damaged = rng.random() < 0.8 and _damage(arguments, rng)
    known = [param.grad for param in params]
    before = table.clone()
    try:
        found = _extension.READ_GRADIENTS(*arguments)
    except (TypeError, ValueError, OverflowError, SystemError):
        found, raised = None, True
    else:
        raised = False
    assert torch.equal(table[:2], before[:2]), "the reader wrote to what it reads"
    assert bool((table[2, [0, -1]] == MARK).all()), "the reader wrote outside of the addresses"
    if found is None:
        kept = all(param.grad is grad for param, grad in zip(params, known, strict=True))
        assert kept, "the reader kept gradients that it did not return"
        assert damaged or not raised, "the reader raised for usual arguments"
        return False
    assert all(a is b for a, b in zip(found, known, strict=True)), "other gradients were returned"
    wanted = [0 if grad is None else grad.data_ptr() for grad in known]
    assert table[2, 1:-1].tolist() == wanted, "the addresses are wrong"
    assert not take or all(param.grad is None for param in params), "some were not taken"
    return True


def _parameter(rng: random.Random) -> Tensor:
    param = torch.nn.Parameter(torch.zeros(rng.choice((1, 3, 64))))
    kind = rng.choice(("usual",) * 12 + ("none", "view", "strided", "float64", "meta"))
    if kind == "none":
        return param
    grads = {
        "usual": lambda: torch.ones_like(param),
        "view": lambda: torch.ones(2 * len(param))[: len(param)],
        "strided": lambda: torch.ones(2 * len(param))[::2],
        "float64": lambda: torch.ones_like(param, dtype=torch.float64),
        "meta": lambda: torch.ones_like(param, device="meta"),
    }
    param.grad_dtype = None
    if kind != "meta":  # torch refuses it
        param.grad = grads[kind]()
    return param


def _damage(arguments: list[Any], rng: random.Random) -> bool:
    """Replace one argument, or an element of one, by something else; return True."""
    junk = (None, 7, -1, "grad", [], (), object(), _Raises(), 1 << 70, torch.zeros(2))
    index = rng.choice((0, 0, 1, 2, 2, 3, 3, 4, 9))
    if index == 0 and arguments[0] and rng.random() < 0.7:
        arguments[0] = list(arguments[0])
        arguments[0][rng.randrange(len(arguments[0]))] = rng.choice(junk)
    elif index in (2, 3):
        items = list(arguments[index])
        items[rng.randrange(len(items))] = rng.choice(junk)
        arguments[index] = tuple(items) if rng.random() < 0.8 else tuple(items[1:])
    elif index == 9:
        if rng.random() < 0.5:
            arguments.append(rng.choice(junk))
        else:
            arguments.pop()
    else:
        replaced = [each for each in junk if not isinstance(each, list)]
        arguments[index] = rng.choice(replaced if index else [*replaced, tuple(arguments[0])])
    return True
