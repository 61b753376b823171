# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""How the programs of a kernel find their elements: the tables of :mod:`wsam_fused.plan`.

A program takes whole chunks and walks the tensors of a chunk one after the other. The elements of a
tensor within a chunk go in whole blocks of vectors of 16 bytes as far as every address is aligned
and a block is full, the rest one element per thread. One per thread, because Triton would otherwise
give masked loads and stores different layouts, with an exchange between threads for each. As it is,
the same thread reads and writes an element of all operands, so that two may share memory.
"""

from __future__ import annotations

import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]

from wsam_fused.backends.triton.constants import FLAG, ROW
from wsam_fused.backends.triton.math import rounded_by_chance


@triton.jit
def cell(table, row, tensors, tensor):
    """One entry of the table of addresses."""
    return tl.load(table + tensors * row + tensor)


@triton.jit
def last_tensor(first_tensor, chunk, tensors, chunks):
    """The last tensor that may reach into the chunk."""
    following = tl.load(first_tensor + chunk + 1, mask=chunk + 1 < chunks, other=tensors - 1)
    return following.to(tl.int32)


@triton.jit
def segment(table, tensors, tensor, chunk, chunk_size):
    """What of the tensor lies in the chunk: its first element (int64) and how many (int32)."""
    low = chunk.to(tl.int64) * chunk_size - cell(table, ROW.value.OFFSET, tensors, tensor)
    begin = tl.maximum(low, 0)
    end = tl.minimum(low + chunk_size, cell(table, ROW.value.SIZE, tensors, tensor))
    return begin, tl.maximum(end - begin, 0).to(tl.int32)


@triton.jit
def address(table, row, tensors, tensor, begin, STORAGE: tl.constexpr):
    """Address of the tensor's first element in the chunk; 0 where there is no tensor."""
    start = cell(table, row, tensors, tensor)
    size: tl.constexpr = STORAGE.primitive_bitwidth // 8
    return tl.where(start == 0, start, start + begin * size)


@triton.jit
def whole_blocks(addresses, count, BLOCK: tl.constexpr):
    """How many of the elements go in whole blocks; ``addresses`` are or-ed together."""
    return tl.where(addresses % 16 == 0, count // BLOCK * BLOCK, 0)


@triton.jit
def pointer(start, STORAGE: tl.constexpr, WHOLE: tl.constexpr):
    """The address as a pointer that is aligned to 16 bytes if WHOLE."""
    begin = start.to(tl.pointer_type(STORAGE))
    if WHOLE:
        begin = tl.multiple_of(begin, 16)
    return begin


@triton.jit
def load(start, index, count, STORAGE: tl.constexpr, T: tl.constexpr, WHOLE: tl.constexpr):
    """Elements as T; without WHOLE those below count, and 0 for the others."""
    if WHOLE:
        values = tl.load(pointer(start, STORAGE, WHOLE) + index)
    else:
        values = tl.load(pointer(start, STORAGE, WHOLE) + index, mask=index < count, other=0.0)
    return values.to(T)


@triton.jit
def store(start, index, count, values, STORAGE: tl.constexpr, WHOLE: tl.constexpr):
    """Round elements to their dtype and write them; without WHOLE those below count."""
    if WHOLE:
        tl.store(pointer(start, STORAGE, WHOLE) + index, values.to(STORAGE))
    else:
        tl.store(pointer(start, STORAGE, WHOLE) + index, values.to(STORAGE), mask=index < count)


@triton.jit
def store_rounded(
    start,
    index,
    count,
    values,
    chance,
    OPERAND: tl.constexpr,
    STORAGE: tl.constexpr,
    BY_CHANCE: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Like :func:`store`, but bfloat16 is rounded by chance if BY_CHANCE."""
    if BY_CHANCE and STORAGE == tl.bfloat16:
        bits = rounded_by_chance(values, chance, index, OPERAND)
        store(start, index, count, bits, tl.uint16, WHOLE)
    else:
        store(start, index, count, values, STORAGE, WHOLE)


@triton.jit
def is_last_program(flags):
    """Whether this program is the last one that gets here; it then sees what the others wrote.

    The counter is back at 0 afterwards. The barrier before it orders the writes of all threads
    before the one thread that counts.
    """
    tl.debug_barrier()
    others = tl.atomic_add(flags + FLAG.value.ARRIVED, 1.0, sem="acq_rel")
    last = others == (tl.num_programs(0) - 1).to(tl.float64)
    if last:
        tl.store(flags + FLAG.value.ARRIVED, 0.0)
    return last
