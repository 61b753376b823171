"""Averages tensors over the ranks of a process group, in few large pieces, while others compute."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from wsam_fused.kept_memory import keeps_scratch
from wsam_fused.parameters import is_dense

# Of one collective: as much as DistributedDataParallel puts into one. Larger ones begin later,
# smaller ones cost more messages.
BUCKET_BYTES = 25 * 2**20
# In elements: every tensor begins where kernels can load 16 bytes at once.
_ALIGNMENT = 16


class Averages:
    """Averages one list of tensors at a time.

    Small tensors are copied together into buckets; one that fills a bucket is averaged where it is.
    On a CPU the buckets are kept between steps.
    """

    def __init__(self) -> None:
        self._kept: dict[int, Tensor] = {}
        # With what is averaged, which has to live until then.
        self._pending: list[tuple[dist.Work | None, Tensor]] = []

    @torch.no_grad()
    def start(self, tensors: Sequence[Tensor], group: dist.ProcessGroup) -> list[Tensor]:
        """Begin to average; every rank of the group has to do it with the same list.

        Args:
            tensors: Of any shapes, dtypes and devices. They may be overwritten, and are not needed
                any more once this returns.
            group: The ranks.

        Returns:
            Tensors of the same shapes and strides (of others where a tensor is no dense block of
            memory), which have the means after :meth:`wait`.
        """
        if self._pending:  # a step has failed; its buckets may still be written to
            self._kept, self._pending = {}, []
        means = list(tensors)
        for number, indices in enumerate(_buckets(tensors)):
            members = [tensors[i] for i in indices]
            bucket = _own_memory(members)
            if bucket is None:
                offsets, size = _places(members)
                bucket = self._bucket(number, size, members[0])
                views = [
                    _view(bucket, offset, like)
                    for offset, like in zip(offsets, members, strict=True)
                ]
                torch._foreach_copy_(views, members)
                for i, view in zip(indices, views, strict=True):
                    means[i] = view
            self._pending.append((_start(bucket, group), bucket))
        return means

    def wait(self) -> None:
        """Let whatever uses the means come after them; on a GPU the host does not wait.

        Raises:
            RuntimeError: A rank has failed or did not answer in time.
        """
        pending, self._pending = self._pending, []
        try:
            for work, _ in pending:
                if work is not None:
                    work.wait()
        except BaseException:
            self._kept = {}
            raise

    def _bucket(self, number: int, size: int, like: Tensor) -> Tensor:
        kept = self._kept.get(number)
        wanted = (size, like.dtype, like.device)
        if kept is not None and (kept.numel(), kept.dtype, kept.device) == wanted:
            return kept
        bucket = torch.zeros(size, dtype=like.dtype, device=like.device)
        if keeps_scratch(like.device):
            self._kept[number] = bucket
        return bucket


def is_distributed() -> bool:
    """Whether this process is one of several."""
    return dist.is_available() and dist.is_initialized()


class Total:
    """The sum of a small tensor over the ranks, formed while others compute.

    Args:
        value: Of this rank.
        group: The ranks.
    """

    def __init__(self, value: Tensor, group: dist.ProcessGroup) -> None:
        self._value = value.clone()
        self._work: dist.Work | None = dist.all_reduce(self._value, group=group, async_op=True)

    def wait(self) -> Tensor:
        """Return the sum.

        Raises:
            RuntimeError: A rank has failed or did not answer in time.
        """
        if self._work is not None:
            self._work.wait()
        return self._value


def _start(bucket: Tensor, group: dist.ProcessGroup) -> dist.Work | None:
    operation = dist.ReduceOp.AVG
    if dist.get_backend(group) != "nccl":
        # Divided before and not after, so that a sum of 16 bits does not overflow.
        bucket.div_(dist.get_world_size(group))
        operation = dist.ReduceOp.SUM
    work: dist.Work | None = dist.all_reduce(bucket, operation, group=group, async_op=True)
    return work


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[int]]:
    """Yield the indices of tensors that are averaged together; all have one dtype and device."""
    alike: dict[tuple[torch.device, torch.dtype], list[int]] = defaultdict(list)
    for index, tensor in enumerate(tensors):
        if tensor.numel():
            alike[tensor.device, tensor.dtype].append(index)
    for indices in alike.values():
        bucket: list[int] = []
        filled = 0
        for index in indices:
            size = tensors[index].nbytes
            if bucket and filled + size > BUCKET_BYTES:
                yield bucket
                bucket, filled = [], 0
            bucket.append(index)
            filled += size
        yield bucket


def _own_memory(members: Sequence[Tensor]) -> Tensor | None:
    """Return the memory of a tensor that needs no bucket; None if it has to be copied into one."""
    first = members[0]
    if len(members) > 1 or first.nbytes < BUCKET_BYTES or not is_dense(first):
        return None
    return first.as_strided((first.numel(),), (1,))


def _places(members: Sequence[Tensor]) -> tuple[list[int], int]:
    """Return where each tensor begins in a bucket, and the size of the bucket, in elements."""
    offsets, end = [], 0
    for tensor in members:
        offsets.append(end)
        end += -(-tensor.numel() // _ALIGNMENT) * _ALIGNMENT
    return offsets, end


def _view(bucket: Tensor, offset: int, like: Tensor) -> Tensor:
    if is_dense(like):
        return bucket.as_strided(like.shape, like.stride(), offset)
    return bucket[offset : offset + like.numel()].view(like.shape)
