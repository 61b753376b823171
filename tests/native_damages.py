"""What can be wrong with a call of a native operation, one function for each kind."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from native_calls import Call, TableRow
from torch import Tensor

TENSORS = ("table", "chunks", "groups", "partials", "scalars", "flags", "steps")
BOOLEANS = ("with_first", "accumulate", "has_backup", "has_master", "keep_point", "count_skipped")
WRITTEN = ("partials", "scalars", "flags", "steps")
OTHER_DTYPES = (
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.int32,
    torch.int64,
    torch.uint8,
    torch.bool,
    torch.complex64,
)
BEYOND = (1 << 31, 1 << 32, (1 << 32) + 1, 1 << 62, (1 << 63) - 1, -(1 << 63), 1 << 63, 1 << 80)
# What each number may be is less than these; see csrc/check.h.
WRONG_NUMBERS: dict[str, tuple[int, ...]] = {
    "chunk_size": (0, -64, 1, 63, 65, 1000, (1 << 63) - 1, -(1 << 63), 1 << 63),
    "gradient": (-1, 0, 4, 11, *BEYOND),
    "geometry": (-1, 3, 4, *BEYOND),
    "target": (-1, 4, *BEYOND),
    "base_rule": (-1, 5, *BEYOND),
    "evaluations": (-1, 0, 4, 64, *BEYOND),
    "required": (-1, 0, 8, *BEYOND),
    "checked": (-1, 8, *BEYOND),
    "rounding_seed": (-2, 1 << 53, (1 << 63) - 1, -(1 << 63), 1 << 63),
}
LARGEST_SIZE = 1 << 48

Damage = Callable[[Call, random.Random], bool]


def damage(call: Call, rng: random.Random, kinds: tuple[Damage, ...]) -> None:
    """Damage a call in one to three ways; none of them twice, which could mend it again."""
    wanted = rng.choice((1, 1, 1, 2, 3))
    left = list(kinds)
    while left and len(call.damages) < wanted:
        kind = left.pop(rng.randrange(len(left)))
        if kind is wrong_count and len(call.damages) + 1 < wanted:
            continue  # the others want to find all arguments
        if kind(call, rng):
            call.damages.append(kind.__name__)


def _is_block(value: object) -> bool:
    if not isinstance(value, Tensor) or value.layout != torch.strided:
        return False
    return value.device.type == "cpu" and value.is_contiguous()


def _some_block(call: Call, rng: random.Random) -> str | None:
    """Name an argument that is still a block of memory, if there is one."""
    names = [name for name in TENSORS if _is_block(call.arguments.get(name))]
    return rng.choice(names) if names else None


# ---- arguments that are not what the schema or the contract says -------------------------------


def wrong_dtype(call: Call, rng: random.Random) -> bool:
    name = _some_block(call, rng)
    if name is None:
        return False
    tensor = call.arguments[name]
    dtype = rng.choice([each for each in OTHER_DTYPES if each != tensor.dtype])
    call.arguments[name] = torch.zeros(tensor.shape, dtype=dtype)
    return True


def wrong_size(call: Call, rng: random.Random) -> bool:
    name = _some_block(call, rng)
    # How many chunks there are follows from the table: see wrong_number_of_chunks().
    if name in (None, "chunks") or call.arguments[name].dim() not in (1, 2):
        return False
    tensor = call.arguments[name]
    if tensor.dim() == 1:
        others = [n for n in (0, 1, len(tensor) - 1, len(tensor) + 1, 1000) if n != len(tensor)]
        call.arguments[name] = tensor.new_zeros(max(0, rng.choice(others)))
        return len(call.arguments[name]) != len(tensor)
    rows, columns = tensor.shape
    shapes = [(rows * columns,), (1, rows, columns), (rows + 1, columns), (rows - 1, columns)]
    if name == "groups":
        shapes = [*shapes[:2], (rows, columns + 1), (rows, columns - 1)]
    call.arguments[name] = tensor.new_zeros(rng.choice(shapes))
    return True


def not_contiguous(call: Call, rng: random.Random) -> bool:
    name = _some_block(call, rng)
    if name is None or call.arguments[name].numel() < 2:
        return False
    tensor = call.arguments[name]
    double = torch.zeros(*tensor.shape[:-1], 2 * tensor.shape[-1], dtype=tensor.dtype)
    huge = tensor.new_zeros(()).expand(1 << 40)
    same = torch.zeros(1, dtype=tensor.dtype).expand(tensor.shape)
    call.arguments[name] = rng.choice((double[..., ::2], huge, same))
    return True


def other_kind_of_tensor(call: Call, rng: random.Random) -> bool:
    name = _some_block(call, rng)
    if name is None:
        return False
    tensor = call.arguments[name]
    sparse = torch.zeros(tensor.shape, dtype=tensor.dtype).to_sparse()
    call.arguments[name] = rng.choice((sparse, torch.zeros_like(tensor, device="meta")))
    return True


def no_tensor(call: Call, rng: random.Random) -> bool:
    wrong = (None, "table", [1, 2], {"a": 1}, object(), [torch.zeros(2)])
    name = rng.choice([name for name in TENSORS if name in call.arguments] or ["table"])
    call.arguments[name] = rng.choice(wrong)
    return True


def shared_memory(call: Call, rng: random.Random) -> bool:
    """Put an argument that is written into the memory of another one."""
    tensors = [n for n in TENSORS if _is_block(call.arguments.get(n))]
    written = [n for n in WRITTEN if n in tensors and n in _written_by(call)]
    if not written or len(tensors) < 2:
        return False
    one = rng.choice(written)
    other = rng.choice([name for name in tensors if name != one])
    a, b = call.arguments[one], call.arguments[other]
    sizes = [tensor.numel() * tensor.element_size() for tensor in (a, b)]
    if min(sizes) == 0:
        return False
    shift = rng.randrange(0, sizes[0], 8)
    block = torch.zeros(-(-max(sizes[0], shift + sizes[1]) // 8) * 8, dtype=torch.uint8)
    inside = block[shift : shift + sizes[1]].view(b.dtype).view(b.shape)
    call.arguments[one] = block[: sizes[0]].view(a.dtype).view(a.shape).copy_(a)
    call.arguments[other] = inside.copy_(b)
    call.other_memory.append(block)
    return True


def _written_by(call: Call) -> tuple[str, ...]:
    writes = {"reduce": ("partials", "scalars"), "perturb_": ("flags",)}
    return writes.get(call.operation, ("scalars", "flags", "steps"))


def wrong_number(call: Call, rng: random.Random) -> bool:
    name = rng.choice([name for name in WRONG_NUMBERS if name in call.arguments])
    wrong = (None, "one", [1], 0.5, object(), *WRONG_NUMBERS[name] * 3)
    call.arguments[name] = rng.choice(wrong)
    return True


def wrong_boolean(call: Call, rng: random.Random) -> bool:
    names = [name for name in BOOLEANS if name in call.arguments]
    call.arguments[rng.choice(names)] = rng.choice(("yes", [True], object()))  # None is False
    return True


def wrong_dtype_argument(call: Call, rng: random.Random) -> bool:
    names = [n for n in ("dtype", "grad_dtype", "state_dtype") if n in call.arguments]
    name = rng.choice(names)
    others = (torch.int64, torch.bool, torch.complex64, torch.int8, None, "float32", -1, 1000)
    call.arguments[name] = rng.choice(others)
    return True


def contradicting_options(call: Call, rng: random.Random) -> bool:
    """Take away the copy of w where it is needed, or the 16 bits that have float32 weights."""
    arguments = call.arguments
    wide = arguments["dtype"] in (torch.float32, torch.float64)
    if rng.random() < 0.5 and wide:
        arguments["has_master"] = True
        return True
    if call.operation == "update_" or "has_backup" not in arguments:
        return False
    if wide and arguments["geometry"] == 0:
        return False
    arguments["has_backup"] = False
    return True


def wrong_count(call: Call, rng: random.Random) -> bool:
    if rng.random() < 0.5:
        call.arguments.pop(rng.choice(list(call.arguments)))
    else:
        call.arguments["surplus"] = rng.choice((0, None, torch.zeros(1)))
    return True


# ---- a table that does not say what a list of tensors can be -----------------------------------


def _plan_of(call: Call) -> tuple[Tensor, Tensor] | None:
    """The table and the chunks, unless they have been replaced already."""
    table, chunks = (call.arguments.get(name) for name in ("table", "chunks"))
    if (
        not (_is_block(table) and _is_block(chunks))
        or table.dim() != 2
        or 0 in (table.shape[-1], chunks.numel())
    ):
        return None
    usable = table.dtype == chunks.dtype == torch.int64 and chunks.dim() == 1
    return (table, chunks) if usable and table.shape[0] == len(TableRow) else None


def wrong_place(call: Call, rng: random.Random) -> bool:
    """Change where a tensor begins, how large it is, or its group, to what cannot be."""
    plan = _plan_of(call)
    if plan is None:
        return False
    table = plan[0]
    tensor = rng.randrange(table.shape[1])
    far = (-1, -64, -(1 << 63), (1 << 63) - 1, 1 << 62)
    row, values = rng.choice(
        (
            (TableRow.SIZE, (0, LARGEST_SIZE + 1, 1 << 40, *far)),
            (TableRow.OFFSET, (int(table[TableRow.OFFSET, tensor]) + 64, 1, *far)),
            (TableRow.GROUP, (3, 1 << 40, *far)),
        )
    )
    table[row, tensor] = rng.choice(values)
    return True


def wrong_chunk(call: Call, rng: random.Random) -> bool:
    plan = _plan_of(call)
    if plan is None:
        return False
    table, chunks = plan
    index = rng.randrange(len(chunks))
    wrong = [v for v in (-1, 0, table.shape[1], 1 << 40, -(1 << 63)) if v != int(chunks[index])]
    chunks[index] = rng.choice(wrong)
    return True


def wrong_number_of_chunks(call: Call, rng: random.Random) -> bool:
    plan = _plan_of(call)
    if plan is None:
        return False
    chunks = plan[1]
    count = rng.choice([n for n in (0, len(chunks) - 1, len(chunks) + 1, 999) if n != len(chunks)])
    call.arguments["chunks"] = torch.cat([chunks, chunks[-1:].expand(1000)])[:count].clone()
    if isinstance(call.arguments.get("partials"), Tensor):
        call.arguments["partials"] = torch.zeros(2 * count, dtype=torch.float64)
    return True


def missing_address(call: Call, rng: random.Random) -> bool:
    plan = _plan_of(call)
    if plan is None or not call.needed:
        return False
    row, tensor = rng.choice(call.needed)
    if tensor >= plan[0].shape[1]:
        return False
    plan[0][row, tensor] = 0
    return True


def wrong_point(call: Call, rng: random.Random) -> bool:
    """Say that the parameters are where they cannot be."""
    flags = call.arguments.get("flags")
    if call.operation == "reduce" or not _is_block(flags) or flags.dtype != torch.float64:
        return False
    if flags.numel() == 0:
        return False
    wrong = (-1.0, 4.0, 0.5, 1e30, float("nan"), float("inf"), -float("inf"))
    flags.view(-1)[0] = rng.choice(wrong)
    return True


OF_ARGUMENTS: tuple[Damage, ...] = (
    wrong_dtype,
    wrong_size,
    not_contiguous,
    other_kind_of_tensor,
    no_tensor,
    shared_memory,
    wrong_number,
    wrong_boolean,
    wrong_dtype_argument,
    contradicting_options,
    wrong_count,
)
OF_TABLES: tuple[Damage, ...] = (
    wrong_place,
    wrong_chunk,
    wrong_number_of_chunks,
    missing_address,
    wrong_point,
)
