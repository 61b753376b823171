"""Writes CIFAR folders in the published layouts, with fewer images."""

from __future__ import annotations

import pickle
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.paper.cifar import PUBLISHED, Published

# Enough for a tenth to have every class, of CIFAR-100 too.
_ROWS = {"cifar10": (40, 30), "cifar100": (1000, 200)}


def small(name: str) -> Published:
    """Return the published data set with fewer images in every file."""
    train, test = _ROWS[name]
    return replace(PUBLISHED[name], train_rows=train, test_rows=test)


def contents(name: str) -> dict[str, tuple[np.ndarray, list[int]]]:
    """Return pixels [n, 3072] and labels by the name of their file in the "python version"."""
    published = small(name)
    layout = published.layouts[0]
    numbers = np.random.default_rng(0)
    found = {}
    for file in layout.files:
        rows = published.test_rows if file == layout.test else published.train_rows
        pixels = numbers.integers(0, 256, (rows, 3072), np.uint8)
        # Channels of different means and deviations.
        pixels[:, :1024] //= 2
        pixels[:, 2048:] = pixels[:, 2048:] // 4 + 100
        labels = numbers.permutation(rows) % published.classes
        found[file] = pixels, labels.tolist()
    return found


def write_python(name: str, parent: Path) -> Path:
    """Write the "python version" below a folder; return its own folder."""
    published = small(name)
    folder = parent / published.layouts[0].folder
    folder.mkdir(parents=True)
    for file, (pixels, labels) in contents(name).items():
        (folder / file).write_bytes(python2_pickle(pixels, labels, published.key))
    return folder


def write_binary(name: str, parent: Path) -> Path:
    """Write the "binary version", of the same contents; return its own folder."""
    published = small(name)
    folder = parent / published.layouts[1].folder
    folder.mkdir(parents=True)
    for file, (pixels, labels) in contents(name).items():
        fine = np.array(labels, np.uint8)[:, None]
        # Which of the 20 coarse labels does not matter here, but that it is another number.
        columns = [fine, pixels] if published.label_bytes == 1 else [fine % 20, fine, pixels]
        np.concatenate(columns, 1).tofile(folder / f"{file}.bin")
    return folder


def python2_pickle(pixels: np.ndarray, labels: list[int], key: bytes) -> bytes:
    """Return what Python 2 and its numpy wrote with protocol 2, as in the published files.

    Its strings are byte strings, its flags numbers, and numpy's functions are where numpy 1 had
    them; no Python 3 writes such a file.
    """
    names = [f"{position}.png".encode() for position in range(len(labels))]
    filenames = b"".join(map(_string, names))
    items = [
        _string(b"batch_label") + _string(b"training batch 1 of 5"),
        _string(key) + _list(b"".join(map(_integer, labels))),
        _string(b"data") + _array(pixels),
        _string(b"filenames") + _list(filenames),
    ]
    body = pickle.EMPTY_DICT + pickle.MARK + b"".join(items) + pickle.SETITEMS
    return pickle.PROTO + b"\x02" + body + pickle.STOP


def _string(value: bytes) -> bytes:
    if len(value) < 256:
        return pickle.SHORT_BINSTRING + bytes([len(value)]) + value
    return pickle.BINSTRING + struct.pack("<i", len(value)) + value


def _integer(value: int) -> bytes:
    return pickle.BININT + struct.pack("<i", value)


def _list(items: bytes) -> bytes:
    return pickle.EMPTY_LIST + pickle.MARK + items + pickle.APPENDS


def _array(pixels: np.ndarray) -> bytes:
    empty = pickle.GLOBAL + b"numpy.core.multiarray\n_reconstruct\n"
    empty += pickle.GLOBAL + b"numpy\nndarray\n" + _integer(0) + pickle.TUPLE1 + _string(b"b")
    empty += pickle.TUPLE3 + pickle.REDUCE
    element = pickle.GLOBAL + b"numpy\ndtype\n" + _string(b"u1") + _integer(0) + _integer(1)
    element += pickle.TUPLE3 + pickle.REDUCE
    element += pickle.MARK + _integer(3) + _string(b"|") + 3 * pickle.NONE
    element += _integer(-1) + _integer(-1) + _integer(0) + pickle.TUPLE + pickle.BUILD
    shape = _integer(pixels.shape[0]) + _integer(pixels.shape[1]) + pickle.TUPLE2
    state = pickle.MARK + _integer(1) + shape + element + pickle.NEWFALSE
    return empty + state + _string(pixels.tobytes()) + pickle.TUPLE + pickle.BUILD
