"""Copies of the weights while they are perturbed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from wsam_fused.plan import PointerTable, addresses_of

Layout = tuple[torch.Size, tuple[int, ...]]


class Backups:
    """Memory for one copy of every parameter of a list, in its layout.

    Args:
        addresses: int64 ``[n]`` on the host.
        tensors: Returns the copies; views are made only when somebody asks for them.
    """

    def __init__(self, addresses: Tensor, tensors: Callable[[], list[Tensor]]) -> None:
        self.addresses = addresses
        self.tensors = tensors

    @classmethod
    def of(cls, tensors: Iterable[Tensor]) -> Backups:
        """Use the memory of ``tensors``."""
        kept = list(tensors)
        return cls(addresses_of(kept), lambda: kept)

    @classmethod
    def in_block(cls, block: Tensor, layouts: Sequence[Layout], table: PointerTable) -> Backups:
        """Use one block, with every copy at its place in the index space of ``table``.

        An allocation for each of thousands of tensors would take longer than the kernels.

        Args:
            block: Memory of ``table.total`` elements.
            layouts: Shape and strides of each.
            table: Of the list.
        """

        def views() -> list[Tensor]:
            places = zip(layouts, table.offsets.tolist(), strict=True)
            return [block.as_strided(*layout, offset) for layout, offset in places]

        return cls(table.offsets * block.element_size() + block.data_ptr(), views)
