"""CIFAR-10 and CIFAR-100 from a local folder, in either of the layouts that are published.

The "python version" holds pickles, and a pickle may name any function to be called. Here it can
name three things, each replaced by a class of this file, so that no file can make numpy or anything
else do something; this also does not depend on where a version of numpy keeps its functions.

Reference:
    Krizhevsky: Learning Multiple Layers of Features from Tiny Images, 2009;
    https://www.cs.toronto.edu/~kriz/cifar.html describes both layouts.
"""

from __future__ import annotations

import math
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_PIXELS = 3 * 32 * 32
_PAGE = "https://www.cs.toronto.edu/~kriz/cifar.html"


@dataclass(frozen=True)
class Layout:
    """Where one of the published versions keeps what.

    Attributes:
        archive: Name of the file that is downloaded.
        folder: Name of the folder in it.
        train: Names of the files for training; those that end in .bin are records, others pickles.
        test: Name of the file for testing.
    """

    archive: str
    folder: str
    train: tuple[str, ...]
    test: str

    @property
    def files(self) -> tuple[str, ...]:
        """Names of all files that are read."""
        return (*self.train, self.test)


@dataclass(frozen=True)
class Published:
    """A data set as it is published.

    Attributes:
        title: What people call it.
        classes: Labels are 0 ... classes - 1.
        train_rows: Images in every file for training.
        test_rows: Images in the file for testing.
        key: Name of the labels in a pickle.
        label_bytes: In a binary record, before the pixels; the last of them is the label.
        layouts: The versions, the first that is found is taken.
    """

    title: str
    classes: int
    train_rows: int
    test_rows: int
    key: bytes
    label_bytes: int
    layouts: tuple[Layout, ...]


class Images(NamedTuple):
    """Images [n, 3, 32, 32], uint8, red, green and blue, and labels [n], int64."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


_BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))
_BINARY_BATCHES = tuple(f"{name}.bin" for name in _BATCHES)

PUBLISHED = {
    "cifar10": Published(
        title="CIFAR-10",
        classes=10,
        train_rows=10_000,
        test_rows=10_000,
        key=b"labels",
        label_bytes=1,
        layouts=(
            Layout("cifar-10-python.tar.gz", "cifar-10-batches-py", _BATCHES, "test_batch"),
            Layout(
                "cifar-10-binary.tar.gz",
                "cifar-10-batches-bin",
                _BINARY_BATCHES,
                "test_batch.bin",
            ),
        ),
    ),
    "cifar100": Published(
        title="CIFAR-100",
        classes=100,
        train_rows=50_000,
        test_rows=10_000,
        key=b"fine_labels",
        # The coarse label, one of 20, comes before the fine one.
        label_bytes=2,
        layouts=(
            Layout("cifar-100-python.tar.gz", "cifar-100-python", ("train",), "test"),
            Layout("cifar-100-binary.tar.gz", "cifar-100-binary", ("train.bin",), "test.bin"),
        ),
    ),
}


def read(published: Published, folder: Path | None) -> Images:
    """Return all images and labels, in the order of the files.

    Args:
        published: One of ``PUBLISHED``.
        folder: The unpacked folder, of either version, or the one that it is in.

    Raises:
        FileNotFoundError: If the folder, or a file in it, is not there or not unpacked; it says
            what to download.
        ValueError: Of a file that is not as published: its size, its shape, its labels, or what
            its pickle names.
    """
    place, layout = _find(published, folder)
    parts = [_read_file(published, place / name, published.train_rows) for name in layout.train]
    test_x, test_y = _read_file(published, place / layout.test, published.test_rows)
    # Copies, also of one part: what comes from a pickle cannot be written to, and torch warns.
    train_x, train_y = (np.concatenate(column) for column in zip(*parts, strict=True))
    return Images(
        _images(train_x),
        torch.from_numpy(train_y),
        _images(test_x.copy()),
        torch.from_numpy(test_y),
    )


def _images(pixels: NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(pixels).view(-1, 3, 32, 32)


def _find(published: Published, folder: Path | None) -> tuple[Path, Layout]:
    """Return the folder with the files and their layout; a complete one if there is one."""
    if folder is None or not folder.is_dir():
        raise FileNotFoundError(f"folder is {folder}, not a folder; {_instruction(published)}")
    incomplete = None
    for layout in published.layouts:
        for place in (folder, folder / layout.folder):
            missing = [name for name in layout.files if not (place / name).is_file()]
            if not missing:
                return place, layout
            begun = place.name == layout.folder or len(missing) < len(layout.files)
            if begun and place.is_dir() and incomplete is None:
                incomplete = f"{place} has no {', '.join(missing)}"
    if incomplete is not None:
        raise FileNotFoundError(f"{incomplete}; {_instruction(published)}")
    for layout in published.layouts:
        if (folder / layout.archive).is_file():
            command = f"tar -xzf {folder / layout.archive} -C {folder}"
            raise FileNotFoundError(f"{folder / layout.archive} is not unpacked; run: {command}")
    raise FileNotFoundError(f"folder {folder} has no {published.title}; {_instruction(published)}")


def _instruction(published: Published) -> str:
    archives = " or ".join(layout.archive for layout in published.layouts)
    folders = " or ".join(layout.folder for layout in published.layouts)
    return (
        f"download {archives} from {_PAGE}, unpack it, and give the folder {folders} "
        "or the one that it is in"
    )


def _read_file(
    published: Published, path: Path, rows: int
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Return pixels [rows, 3072] and labels [rows] of one file, checked."""
    reader = _read_binary if path.suffix == ".bin" else _read_pickle
    return reader(published, path, rows)


def _read_binary(
    published: Published, path: Path, rows: int
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    record = published.label_bytes + _PIXELS
    size = path.stat().st_size
    if size != rows * record:
        raise ValueError(
            f"{path} has {size} bytes, expected {rows * record}: {rows} images of {record} bytes"
        )
    records = np.fromfile(path, np.uint8).reshape(rows, record)
    labels = records[:, published.label_bytes - 1].astype(np.int64)
    _check_labels(published, path, labels.min(), labels.max())
    return records[:, published.label_bytes :], labels


def _read_pickle(
    published: Published, path: Path, rows: int
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    with path.open("rb") as file:
        try:
            # The files were written by Python 2, whose strings are bytes.
            content = _ArraysOnly(file, encoding="bytes").load()
        except Exception as error:
            # A damaged pickle can fail with nearly any exception.
            raise ValueError(
                f"{path} cannot be read as a pickle of {published.title} "
                f"({type(error).__name__}: {error})"
            ) from error
    if not isinstance(content, dict) or not {b"data", published.key} <= content.keys():
        raise ValueError(f"{path} is not a dictionary with b'data' and {published.key!r}")
    data, labels = content[b"data"], content[published.key]
    if not isinstance(data, _Array) or data.shape != (rows, _PIXELS):
        found = list(data.shape) if isinstance(data, _Array) else type(data).__name__
        raise ValueError(f"{path} has data of shape {found}, expected [{rows}, {_PIXELS}]")
    if not isinstance(labels, list) or not all(type(label) is int for label in labels):
        raise ValueError(f"{path} has {published.key!r} that is not a list of int")
    if len(labels) != rows:
        raise ValueError(f"{path} has {len(labels)} labels, expected {rows}")
    # Before numpy sees them: a number in a pickle may have more than 64 bits.
    _check_labels(published, path, min(labels), max(labels))
    return data.values(), np.array(labels, np.int64)


def _check_labels(published: Published, path: Path, lowest: int, highest: int) -> None:
    if lowest < 0 or highest >= published.classes:
        raise ValueError(
            f"{path} has labels from {lowest} to {highest}, expected 0 to {published.classes - 1}"
        )


class _Element:
    """What a pickle says of the elements of an array: they must be bytes without sign."""

    def __init__(self, name: str | bytes, *_: object) -> None:
        if name not in ("u1", b"u1"):
            raise pickle.UnpicklingError(f"an array has dtype {name!r}, expected 'u1'")

    def __setstate__(self, state: object) -> None:
        """Ignore byte order, fields and alignment, which bytes do not have."""


class _Array:
    """What a pickle says of an array; made of it by :meth:`values`, not by numpy's unpickling."""

    def __init__(self, *_: object) -> None:
        self.shape: tuple[int, ...] = ()
        self._data = b""
        self._order: Any = "C"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        """Take shape, element, whether the first axis runs fastest, and the bytes."""
        _, shape, element, by_columns, data = state
        sizes = isinstance(shape, tuple) and all(type(size) is int for size in shape)
        if not sizes or not isinstance(element, _Element) or not isinstance(data, bytes):
            raise pickle.UnpicklingError("an array is not shape, dtype and bytes")
        if math.prod(shape) != len(data):
            raise pickle.UnpicklingError(f"an array of shape {shape} has {len(data)} bytes")
        self.shape, self._data, self._order = shape, data, "F" if by_columns else "C"

    def values(self) -> NDArray[np.uint8]:
        """Return the array; it cannot be written to."""
        return np.frombuffer(self._data, np.uint8).reshape(self.shape, order=self._order)


_ADMITTED = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Element,
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    # Where numpy 2 writes that it is.
    ("numpy._core.multiarray", "_reconstruct"): _Array,
}


class _ArraysOnly(pickle.Unpickler):
    """Reads numbers, strings, lists, dictionaries and arrays of bytes; refuses all else."""

    def find_class(self, module: str, name: str) -> Any:
        """Return the stand-in for a name, or refuse it."""
        if (module, name) not in _ADMITTED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which CIFAR files do not")
        return _ADMITTED[module, name]
