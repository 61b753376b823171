"""Reads the gradients of a parameter list: fast when all is as usual, and checked when not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from wsam_fused import _extension
from wsam_fused.plan import addresses_of, host_integers

_NAMES = ("grad", "dtype")
_METHODS = (
    Tensor.data_ptr,
    Tensor.is_contiguous,
    Tensor._is_view,
    Tensor.numel,
    Tensor.get_device,
)


class Gradients(NamedTuple):
    """The gradients of a list, in a form that the kernels can walk.

    Attributes:
        tensors: One per parameter, None where there is none; all of ``dtype``.
        dtype: The parameters' dtype, or a lower one that all gradients share.
        addresses: int64 ``[n]`` on the host, 0 where there is none; valid until the next read.
        moved: Whether a parameter has other storage or another layout than when the list was made.
    """

    tensors: list[Tensor | None]
    dtype: torch.dtype
    addresses: Tensor
    moved: bool


class GradientReader:
    """Reads ``.grad`` of a list of parameters and knows what is usual for them.

    The kernels walk memory, so a gradient has to have its parameter's device and strides, and all
    gradients one dtype; one that has not is copied into that form.

    Args:
        params: The parameters, all of one dtype and device.
        dtypes: What gradients may have besides the parameters' own dtype.
    """

    def __init__(self, params: Sequence[Tensor], dtypes: Sequence[torch.dtype] = ()) -> None:
        self._params = list(params)
        self._other_dtypes = tuple(dtypes)
        self._dtype = self._params[0].dtype  # of the gradients that were read last
        self._addresses = torch.zeros(len(self._params), dtype=torch.int64, device="cpu")
        self._shared: list[int] | None = None  # whose memory others use; None: not known yet
        self.refresh()

    def refresh(self) -> None:
        """Note where the parameters are now."""
        self._storage = host_integers(map(Tensor.data_ptr, self._params))
        self._sizes = host_integers(map(Tensor.numel, self._params))
        self.noted_layouts = self.layouts()
        self._contiguous = all(map(Tensor.is_contiguous, self._params))
        self._device_index = self._params[0].get_device()  # -1 for the CPU

    def layouts(self) -> list[tuple[torch.Size, tuple[int, ...]]]:
        """Shape and strides of every parameter as they are now."""
        return [(param.shape, param.stride()) for param in self._params]

    def moved(self) -> bool:
        """Whether a parameter has other storage, shape or strides than before."""
        addresses = list(map(Tensor.data_ptr, self._params))
        return addresses != self._storage.tolist() or self.layouts() != self.noted_layouts

    def read(self, *, take: bool = False, copy: bool = False, writes: bool = False) -> Gradients:
        """Read the gradients; the parameters are about to be written to.

        Args:
            take: Leave None in ``.grad``, and return tensors that nobody else writes to, copies if
                need be.
            copy: Return copies.
            writes: They are going to be written to: no two may have the same memory.

        Raises:
            TypeError: A gradient is sparse or complex.
            ValueError: A gradient is on another device than its parameter.

        If it raises, ``.grad`` is as before.
        """
        # Autograd must notice that what it saved of the parameters will be outdated.
        increment_version(self._params)
        usual = None if copy else self._read_usual(take=take)
        if usual is not None:
            try:
                self._make_private(usual, taken=take, written=writes)
            except BaseException:
                self.give_back(usual if take else [])
                raise
            return Gradients(usual, self._dtype, self._addresses, moved=False)
        found = self._found()
        for param, grad in zip(self._params, found, strict=True):
            _check_gradient(param, grad)
        dtype = self._dtype = self._common_dtype(found)
        usable = [walkable(p, g, dtype) for p, g in zip(self._params, found, strict=True)]
        if copy or take or writes:
            usable = [
                g.clone() if g is not None and g is f and (copy or _is_shared(g)) else g
                for f, g in zip(found, usable, strict=True)
            ]
        self._addresses.copy_(addresses_of(usable))
        moved = self.moved()
        if take:
            self._take()
        return Gradients(usable, dtype, self._addresses, moved)

    def _found(self) -> list[Tensor | None]:
        return [param.grad for param in self._params]

    def _take(self) -> None:
        for param in self._params:
            param.grad = None

    def _make_private(self, grads: list[Tensor | None], *, taken: bool, written: bool) -> None:
        """Replace gradients whose memory is not theirs alone by copies.

        Who else uses it is asked once: thousands of questions would take longer than the kernels,
        and a model that keeps memory for its gradients does so from the beginning.
        """
        indices: list[int] = []
        if taken:
            shared = self._shared
            if shared is None:
                pairs = enumerate(grads)
                shared = [i for i, grad in pairs if grad is not None and _is_shared(grad)]
                if all(grad is not None for grad in grads):
                    self._shared = shared
            indices += shared
        if written:
            indices += overlapping(self._addresses, self._sizes * self._dtype.itemsize)
        for i in indices:
            grad = grads[i]
            if grad is not None:
                grads[i] = copy = grad.clone()
                self._addresses[i] = copy.data_ptr()

    def _common_dtype(self, found: Sequence[Tensor | None]) -> torch.dtype:
        dtypes = {grad.dtype for grad in found if grad is not None}
        common = dtypes.pop() if len(dtypes) == 1 else None
        return common if common in self._other_dtypes else self._params[0].dtype

    def _read_usual(self, *, take: bool) -> list[Tensor | None] | None:
        """Read what needs no copy, in one pass; None if anything is not as usual."""
        if _extension.READ_GRADIENTS is None or not self._contiguous:
            return None
        return _extension.READ_GRADIENTS(
            self._params,
            self._dtype,
            _NAMES,
            _METHODS,
            self._device_index,
            self._storage.data_ptr(),
            self._sizes.data_ptr(),
            self._addresses.data_ptr(),
            take,
        )

    def forget_who_shares(self) -> None:
        """Ask again whose memory others use: what was read last was no backward's."""
        self._shared = None

    def give_back(self, tensors: Sequence[Tensor | None]) -> None:
        """Put gradients that were taken out of ``.grad`` back."""
        for param, grad in zip(self._params, tensors, strict=False):
            if param.grad is None:
                param.grad = grad


def _check_gradient(param: Tensor, grad: Tensor | None) -> None:
    if grad is None:
        return
    where = f"the gradient of a parameter of shape {tuple(param.shape)}"
    if grad.layout != torch.strided:
        raise TypeError(f"{where} is {grad.layout}, expected a dense (strided) gradient")
    if grad.is_complex():
        raise TypeError(f"{where} is {grad.dtype}, expected a real gradient")
    if grad.device != param.device:
        raise ValueError(f"{where} is on {grad.device}, expected {param.device}")


def walkable(param: Tensor, grad: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Return the gradient in a dtype and its parameter's strides, a copy if it has others."""
    if grad is None or (grad.stride() == param.stride() and grad.dtype == dtype):
        return grad
    empty = torch.empty_like(param, dtype=dtype, memory_format=torch.preserve_format)
    return empty.copy_(grad)


def overlapping(starts: Tensor, sizes: Tensor) -> list[int]:
    """Return the indices of blocks of memory that begin inside another one.

    Args:
        starts: Addresses, int64 ``[n]``; 0 where there is no block.
        sizes: Bytes of each.
    """
    order = starts.argsort()
    begin = starts[order]
    reached = torch.where(begin != 0, begin + sizes[order], 0).cummax(0).values
    found: list[int] = order[1:][begin[1:] < reached[:-1]].tolist()
    return found


def _is_shared(grad: Tensor) -> bool:
    """Whether other tensors use the memory of a gradient, and may overwrite it.

    Views do, as those of DistributedDataParallel's buckets with ``gradient_as_bucket_view=True``;
    a gradient that a CUDA graph writes at every replay; the gradients of two parameters whose sum
    is used.
    """
    count = getattr(torch._C, "_storage_Use_Count", None)
    storage = grad.untyped_storage()
    # Two users are the gradient and `storage`.
    return grad._is_view() or (count is not None and count(storage._cdata) > 2)


def check_not_overwritten(
    params: Sequence[Tensor], first: Tensor, second: Tensor, message: str
) -> None:
    """Notice that a backward wrote to memory that is still in use.

    Args:
        params: The parameters.
        first: Addresses in use, int64 ``[n]`` on the host, 0 where there is none.
        second: Addresses of the gradients that it wrote.
        message: Of the error, with a place for the ``{shape}`` of the parameter.

    Raises:
        RuntimeError: It did.
    """
    overwritten = (first == second) & (first != 0)
    if bool(overwritten.any()):
        param = params[int(overwritten.nonzero()[0])]
        raise RuntimeError(message.format(shape=tuple(param.shape)))
