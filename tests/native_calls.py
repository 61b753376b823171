"""Random calls of the native operations, right ones and damaged ones.

All memory of a call is one block with gaps: whatever an operation writes where it must not is seen.
A damaged call has to raise and to write nothing. Outside of what is promised, and never generated:
an address in the table that is not 0 and not that of as many elements as the table says.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from wsam_fused.base_rules import BaseRule
from wsam_fused.plan import FLAGS, GroupRow, PointerTable, Slot, TableRow

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
GRADIENTS = (TableRow.GRAD1, TableRow.GRAD2, TableRow.GRAD3)
STATES = (TableRow.STATE1, TableRow.STATE2, TableRow.STATE3)
GAP = 64  # bytes around each tensor, which also aligns it
NUMBERS = (0.0, 1.0, -1.0, 0.3, 1e-30, 1e300, float("inf"), float("nan"))

Interval = tuple[int, int]


class Memory:
    """A block of random bytes that tensors are cut from, with gaps between them.

    Args:
        rng: Of the bytes.
        size: In bytes.
    """

    def __init__(self, rng: random.Random, size: int = 1 << 17) -> None:
        self.bytes = torch.frombuffer(bytearray(rng.randbytes(size)), dtype=torch.uint8)
        self._end = -self.bytes.data_ptr() % GAP

    def cut(self, count: int, dtype: torch.dtype) -> Tensor:
        """Return ``count`` elements of random bits."""
        begin = self._end + GAP
        end = begin + count * dtype.itemsize
        self._end = end + (begin - end) % GAP
        assert self._end + GAP <= self.bytes.numel(), "the block is too small for a call"
        return self.bytes[begin:end].view(dtype)

    def holding(self, values: Tensor) -> Tensor:
        """Return a tensor of the same shape and values."""
        tensor = self.cut(values.numel(), values.dtype).view(values.shape)
        return tensor.copy_(values)

    def interval(self, tensor: Tensor) -> Interval:
        """Where a tensor is in the block."""
        begin = tensor.data_ptr() - self.bytes.data_ptr()
        return begin, begin + tensor.numel() * tensor.element_size()


@dataclass
class Call:
    """One call of an operation.

    Attributes:
        operation: Its name.
        arguments: In the order of the schema.
        memory: Where its tensors are.
        written: Which parts of that it may write.
        needed: Rows of the table, with a tensor, whose address it needs.
        other_memory: Tensors outside of ``memory``, which it may not write.
        damages: What is wrong with it.
    """

    operation: str
    arguments: dict[str, Any]
    memory: Memory
    written: list[Interval]
    needed: list[tuple[TableRow, int]]
    other_memory: list[Tensor] = field(default_factory=list)
    damages: list[str] = field(default_factory=list)


def random_call(rng: random.Random, grad_dtypes: Callable[[torch.dtype], Any]) -> Call:
    """Return a call that is right.

    Args:
        rng: Source of all choices.
        grad_dtypes: Says which dtypes gradients may have for one of the parameters.
    """
    return _Maker(rng, grad_dtypes).call()


class _Maker:
    """Makes a call of its choices."""

    def __init__(self, rng: random.Random, grad_dtypes: Callable[[torch.dtype], Any]) -> None:
        self.rng = rng
        self.operation = rng.choice(("reduce", "perturb_", "update_"))
        self.dtype = rng.choice(DTYPES)
        self.grad_dtype = rng.choice(grad_dtypes(self.dtype))
        self.low = self.dtype.itemsize == 2
        self.has_master = self.low and rng.random() < 0.5
        self.geometry = rng.randrange(3)
        self.has_backup = self.low or self.geometry > 0 or rng.random() < 0.5
        self.evaluations = rng.randint(1, 3)
        self.rule = rng.choice(list(BaseRule))
        narrow = self.low and rng.random() < 0.5
        self.state_dtype = torch.float32 if self.low and not narrow else self.dtype
        self.memory = Memory(rng)
        self.written: list[Tensor] = []
        self.sizes = [rng.choice((1, 2, 63, 64, 65, 130)) for _ in range(rng.randint(1, 5))]
        self.required = rng.randrange(1, 1 << self.evaluations)
        self.checked = rng.randrange(1 << self.evaluations)
        self.by_noise = False
        self._make_tables()

    def _make_tables(self) -> None:
        rng, count = self.rng, len(self.sizes)
        groups = rng.randint(1, 3)
        chosen = [rng.randrange(groups) for _ in self.sizes]
        plan = PointerTable(
            self.sizes, chosen, range(count), rng.choice((64, 128, 1024)), torch.device("cpu")
        )
        self.chunk_size = plan.chunk_size
        self.table = self.memory.holding(plan.table)
        self.chunks = self.memory.holding(plan.chunks)
        self.partials = self.memory.cut(plan.partials.numel(), torch.float64)
        rows = [[rng.choice(NUMBERS) for _ in GroupRow._fields] for _ in range(groups)]
        self.groups = self.memory.holding(torch.tensor(rows, dtype=torch.float64))
        scalars = [rng.choice(NUMBERS) for _ in Slot]
        scalars[Slot.SEED] = float(rng.randrange(1 << 53))
        scalars[Slot.FOUND_INF] = float(rng.random() < 0.1)
        self.scalars = self.memory.holding(torch.tensor(scalars, dtype=torch.float64))
        points = 4 if self.has_backup and self.operation == "perturb_" else 3
        self.flags = self.memory.holding(torch.zeros(FLAGS, dtype=torch.float64))
        self.flags[0] = float(rng.randrange(points))
        ages = [float(rng.randrange(5)) for _ in self.sizes]
        self.steps = self.memory.holding(torch.tensor(ages, dtype=torch.float32))

    def _fill(self, row: TableRow, dtype: torch.dtype, missing: float, written: bool) -> None:
        for i, size in enumerate(self.sizes):
            if self.rng.random() >= missing:
                tensor = self.memory.cut(size, dtype)
                self.table[row, i] = tensor.data_ptr()
                self.written += [tensor] if written else []

    def call(self) -> Call:
        """Return the call."""
        updates, perturbs = self.operation == "update_", self.operation == "perturb_"
        self._fill(TableRow.PARAM, self.dtype, 0.0, updates or perturbs)
        for k, row in enumerate(GRADIENTS):
            absent = 0.2 if not updates or self.required >> k & 1 else 0.0
            written = updates and self.rule == BaseRule.NONE and k < 2
            self._fill(row, self.grad_dtype, absent, written)
        if self.has_backup:
            kept = torch.float32 if self.has_master else self.dtype
            written = updates if self.has_master else perturbs
            self._fill(TableRow.BACKUP, kept, 0.0, written)
        for row in STATES[: len(self.rule.state_keys)]:
            self._fill(row, self.state_dtype, 0.0, updates)
        arguments = getattr(self, f"_{self.operation}")()
        return Call(
            self.operation,
            {**self._common(), **arguments},
            self.memory,
            [self.memory.interval(tensor) for tensor in self.written],
            self._needed(),
        )

    def _needed(self) -> list[tuple[TableRow, int]]:
        found = []
        for i in range(len(self.sizes)):
            rows = [TableRow.PARAM]
            has = [bool(self.table[row, i]) for row in GRADIENTS]
            if self.operation == "perturb_":
                rows += [TableRow.BACKUP] if self.has_backup and (self.by_noise or has[0]) else []
            elif self.operation == "update_":
                rows += self._needed_by_update(has)
            found += [(row, i) for row in rows]
        return found

    def _needed_by_update(self, has: list[bool]) -> list[TableRow]:
        wanted = [has[k] for k in range(self.evaluations) if self.required >> k & 1]
        updates = all(wanted) and not self._is_skipped()
        perturbed = bool(self.flags[0]) and has[0]
        rows: list[TableRow] = []
        if (updates and self.has_master) or (perturbed and self.has_backup):
            rows.append(TableRow.BACKUP)
        if updates:
            rows += STATES[: len(self.rule.state_keys)]
            optional = [k for k in range(1, self.evaluations) if not self.required >> k & 1]
            rows += [GRADIENTS[k] for k in optional]
        return rows

    def _is_skipped(self) -> bool:
        slots = [Slot.GRAD1_SQ + k for k in range(self.evaluations) if self.checked >> k & 1]
        slots += [Slot.METRIC_SQ] if self.checked & 1 else []
        finite = all(math.isfinite(self.scalars[slot]) for slot in slots)
        return not finite or bool(self.scalars[Slot.FOUND_INF])

    def _common(self) -> dict[str, Any]:
        return {
            "table": self.table,
            "chunks": self.chunks,
            "chunk_size": self.chunk_size,
            "dtype": self.dtype,
            "grad_dtype": self.grad_dtype,
        }

    def _reduce(self) -> dict[str, Any]:
        self.written += [self.partials, self.scalars]
        return {
            "groups": self.groups,
            "partials": self.partials,
            "scalars": self.scalars,
            "flags": self.flags,
            "gradient": self.rng.choice(GRADIENTS),
            "geometry": self.geometry,
            "with_first": self.rng.random() < 0.5,
            "accumulate": self.rng.random() < 0.5,
            "has_master": self.has_master,
        }

    def _perturb_(self) -> dict[str, Any]:
        targets = [0, 1, 2, 3] if self.has_backup else [0, 1, 2]
        target = self.rng.choice(targets)
        self.by_noise = 3 in (target, self.flags[0].item())
        if self.by_noise:  # from w and to w only
            self.flags[0], target = (3.0, 0) if target == 0 else (0.0, 3)
        self.written.append(self.flags)
        return {
            "groups": self.groups,
            "scalars": self.scalars,
            "flags": self.flags,
            "geometry": self.geometry,
            "has_backup": self.has_backup,
            "has_master": self.has_master,
            "target": target,
        }

    def _update_(self) -> dict[str, Any]:
        chance = self.dtype == torch.bfloat16 and self.rng.random() < 0.5
        self.written += [self.scalars, self.flags, self.steps]
        return {
            "state_dtype": self.state_dtype,
            "groups": self.groups,
            "scalars": self.scalars,
            "flags": self.flags,
            "steps": self.steps,
            "base_rule": self.rule,
            "evaluations": self.evaluations,
            "required": self.required,
            "checked": self.checked,
            "has_backup": self.has_backup,
            "has_master": self.has_master,
            "keep_point": self.rng.random() < 0.2,
            "count_skipped": self.rng.random() < 0.5,
            "rounding_seed": self.rng.randrange(1 << 53) if chance else -1,
        }
