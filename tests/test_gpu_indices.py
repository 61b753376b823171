"""Which elements a GPU thread visits: the index arithmetic of the CUDA kernels, on the host."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import emulated
import pytest
import torch

from wsam_fused.backends import gpu
from wsam_fused.plan import PointerTable, TableRow

pytestmark = pytest.mark.skipif(emulated.build() is not None, reason=str(emulated.build()))
CPU = torch.device("cpu")
WIDTHS = pytest.mark.parametrize("width", [2, 4, 8])

Visit = tuple[int, int, int, int]


def table_of(sizes: list[int], chunk_size: int) -> PointerTable:
    return PointerTable(sizes, [0] * len(sizes), list(range(len(sizes))), chunk_size, CPU)


def visits(table: PointerTable, chunk: int, width: int) -> list[Visit]:
    """Thread, tensor, first element and count of every piece."""
    flat = torch.ops.wsam_fused_emulated.visits(
        table.table, table.chunks, table.chunk_size, chunk, width
    )
    return list(zip(*[iter(flat)] * 4, strict=True))


@WIDTHS
@pytest.mark.parametrize("chunk_size", [1024, 4096])
@pytest.mark.parametrize(
    "sizes",
    [
        [1, 63, 64, 65, 1, 1, 1000, 5, 4096, 2],
        [5] * 200,  # several windows in a chunk
        [1 + i % 70 for i in range(300)],
        [10_000, 1, 1, 10_000],
    ],
    ids=["mixed", "tiny", "ragged", "large"],
)
def test_every_element_is_visited_once(sizes: list[int], chunk_size: int, width: int) -> None:
    table = table_of(sizes, chunk_size)
    seen: Counter[tuple[int, int]] = Counter()
    for chunk in range(len(table.chunks)):
        for thread, tensor, begin, count in visits(table, chunk, width):
            assert 0 <= thread < 256
            assert count in (1, width)
            assert begin % count == 0, "a vector of an aligned tensor would not be aligned"
            seen.update((tensor, i) for i in range(begin, begin + count))
    assert set(seen.values()) == {1}
    assert len(seen) == sum(sizes)


@WIDTHS
def test_a_chunk_of_one_tensor_is_shared_by_all_threads(width: int) -> None:
    found = visits(table_of([100_000], 4096), 3, width)
    assert {thread for thread, *_ in found} == set(range(256))
    per_thread = Counter(thread for thread, *_ in found)
    assert set(per_thread.values()) == {4096 // (256 * width)}
    # Neighbouring threads move neighbouring vectors.
    first = sorted(found)[0]
    second = next(visit for visit in found if visit[0] == 1)
    assert second[2] - first[2] == width


@WIDTHS
def test_tiny_tensors_keep_many_threads_busy(width: int) -> None:
    found = visits(table_of([64] * 2000, gpu.chunk_size(2000 * 64)), 0, width)
    assert len({thread for thread, *_ in found}) >= 128


@WIDTHS
def test_tensors_beyond_32_bits(width: int) -> None:
    sizes = [7, 2**31 + 12_345, 3, 2**32 + 1]
    table = table_of(sizes, 32_768)
    offsets = table.table[TableRow.OFFSET].tolist()
    borders = {offset // 32_768 for offset in offsets} | {len(table.chunks) - 1}
    for chunk in sorted(borders | {border - 1 for border in borders if border}):
        low, high = chunk * 32_768, (chunk + 1) * 32_768
        expected = {
            tensor: (max(low - offset, 0), min(high - offset, size))
            for tensor, (offset, size) in enumerate(zip(offsets, sizes, strict=True))
            if offset < high and offset + size > low
        }
        found = visits(table, chunk, width)
        assert {tensor for _, tensor, _, _ in found} == set(expected)
        for tensor, (begin, end) in expected.items():
            pieces = sorted((b, c) for _, t, b, c in found if t == tensor)
            assert pieces[0][0] == begin
            assert all(b + c == after for (b, c), (after, _) in pairwise(pieces))
            assert sum(pieces[-1]) == end
    assert max(begin for _, _, begin, _ in found) > 2**32 - 32_768


def test_chunks_depend_on_the_list_only_and_are_enough_for_every_gpu() -> None:
    assert gpu.chunk_size(2000 * 64) == 1024
    for total in (10**5, 10**7, 10**8, 10**9, 10**10):
        size = gpu.chunk_size(total)
        assert 1024 <= size <= 65_536
        assert size % 1024 == 0
        if total >= 10**7:
            assert total // size >= 4096  # of the 528 blocks of an H100 each has several
