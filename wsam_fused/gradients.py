"""Reads the gradients of a parameter list: fast when all is as usual, and checked when not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

# Tensors per block. The Python objects of thousands of tensors do not fit a cache: all checks of
# one block run before the next is looked at.
_BLOCK = 64


class Gradients(NamedTuple):
    """The gradients of a list, in a form that the kernels can walk.

    Attributes:
        tensors: One per parameter, None where there is none.
        addresses: Their addresses, 0 where there is none.
        moved: Whether a parameter has other storage than when the list was made.
    """

    tensors: list[Tensor | None]
    addresses: list[int]
    moved: bool


class GradientReader:
    """Reads ``.grad`` of a list of parameters and knows what is usual for them.

    The kernels walk memory, so a gradient has to have its parameter's dtype, device and strides;
    one that has not is copied into that form.

    Args:
        params: The parameters, all of one dtype and device.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        self._params = list(params)
        self._blocks = [self._params[i : i + _BLOCK] for i in range(0, len(params), _BLOCK)]
        self._dtypes = {self._params[0].dtype}
        self.refresh()

    def refresh(self) -> None:
        """Note where the parameters are now."""
        self._storage = [list(map(Tensor.data_ptr, block)) for block in self._blocks]
        self._contiguous = all(map(Tensor.is_contiguous, self._params))

    def moved(self) -> bool:
        """Whether a parameter has other storage than before."""
        return any(
            list(map(Tensor.data_ptr, block)) != known
            for block, known in zip(self._blocks, self._storage, strict=True)
        )

    def read(self, *, keep: bool, private: bool) -> Gradients:
        """Read the gradients; the parameters are about to be written to.

        Args:
            keep: Leave them in ``.grad``; else ``.grad`` becomes None.
            private: Return tensors that nobody else writes to, copies if need be.

        Raises:
            TypeError: A gradient is sparse or complex.
            ValueError: A gradient is on another device than its parameter.

        If it raises, ``.grad`` is as before.
        """
        tensors: list[Tensor | None] = []
        addresses: list[int] = []
        moved = False
        try:
            for block, known in zip(self._blocks, self._storage, strict=True):
                found = [param.grad for param in block]
                moved = moved or list(map(Tensor.data_ptr, block)) != known
                # Autograd must notice that what it saved of the parameters will be outdated.
                increment_version(block)
                usable = self._usable(block, found)
                if private:
                    usable = _private(found, usable, copy=keep)
                tensors += usable
                addresses += _addresses(usable)
                if not keep:
                    for param in block:
                        param.grad = None
        except BaseException:
            self.give_back(tensors)
            raise
        return Gradients(tensors, addresses, moved)

    def _usable(self, block: list[Tensor], grads: list[Tensor | None]) -> list[Tensor | None]:
        try:
            # map() over C functions: this runs for every tensor in every step.
            usual = self._contiguous and all(map(Tensor.is_contiguous, grads))  # type: ignore[arg-type]
            usual = usual and {g.dtype for g in grads} == self._dtypes  # type: ignore[union-attr]
        except (TypeError, AttributeError, RuntimeError):  # None, or a compressed sparse layout
            usual = False
        if usual:
            return grads
        return [_walkable(param, grad) for param, grad in zip(block, grads, strict=True)]

    def give_back(self, tensors: Sequence[Tensor | None]) -> None:
        """Put gradients that were taken out of ``.grad`` back."""
        for param, grad in zip(self._params, tensors, strict=False):
            if param.grad is None:
                param.grad = grad


def _walkable(param: Tensor, grad: Tensor | None) -> Tensor | None:
    """Return the gradient in its parameter's dtype and strides, a copy if it has others."""
    if grad is None:
        return None
    where = f"the gradient of a parameter of shape {tuple(param.shape)}"
    if grad.layout != torch.strided:
        raise TypeError(f"{where} is {grad.layout}, expected a dense (strided) gradient")
    if grad.is_complex():
        raise TypeError(f"{where} is {grad.dtype}, expected a real gradient")
    if grad.device != param.device:
        raise ValueError(f"{where} is on {grad.device}, expected {param.device}")
    if grad.stride() == param.stride() and grad.dtype == param.dtype:
        return grad
    return torch.empty_like(param, memory_format=torch.preserve_format).copy_(grad)


def _private(
    found: list[Tensor | None], usable: list[Tensor | None], *, copy: bool
) -> list[Tensor | None]:
    """Clone what others may write to: all if asked to, else views.

    DistributedDataParallel with ``gradient_as_bucket_view=True`` makes gradients that are views of
    its buckets, which the next backward overwrites.
    """
    if not copy:
        try:
            if not any(map(Tensor._is_view, usable)):  # type: ignore[arg-type]
                return usable
        except TypeError:  # None among them
            pass
    return [
        g.clone() if g is not None and g is f and (copy or g._is_view()) else g
        for f, g in zip(found, usable, strict=True)
    ]


def _addresses(tensors: list[Tensor | None]) -> list[int]:
    try:
        return list(map(Tensor.data_ptr, tensors))  # type: ignore[arg-type]
    except TypeError:  # None among them
        return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
