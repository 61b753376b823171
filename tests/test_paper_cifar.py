"""CIFAR from folders: both published layouts, written here with fewer images, and broken ones.

The pickles are written opcode by opcode as Python 2 did it, and checked with numpy's own reading.
"""

from __future__ import annotations

import os
import pickle
import struct
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn", reason="benchmarks.paper.data also has data of scikit-learn")

from cifar_folders import contents, python2_pickle, small, write_binary, write_python

from benchmarks.paper import cifar
from benchmarks.paper.data import load

_NAMES = ["cifar10", "cifar100"]
_WRITERS = [write_python, write_binary]


def _expected(name: str) -> tuple[np.ndarray, list[int], np.ndarray, list[int]]:
    *train, (test_x, test_y) = contents(name).values()
    labels = [label for _, part in train for label in part]
    return np.concatenate([pixels for pixels, _ in train]), labels, test_x, test_y


def test_published_sizes() -> None:
    """Files of the binary version have 30,730,000, 153,700,000 and 30,740,000 bytes."""
    ten, hundred = (cifar.PUBLISHED[name] for name in _NAMES)
    assert [ten.train_rows * 3073, ten.test_rows * 3073] == [30_730_000, 30_730_000]
    assert [hundred.train_rows * 3074, hundred.test_rows * 3074] == [153_700_000, 30_740_000]
    assert [ten.label_bytes, hundred.label_bytes] == [1, 2]
    assert [len(layout.train) for layout in ten.layouts + hundred.layouts] == [5, 5, 1, 1]


def test_pickles_of_these_tests_are_what_numpy_reads() -> None:
    pixels, labels = contents("cifar10")["data_batch_1"]
    with warnings.catch_warnings():
        # Of numpy 2.4 about such files: a flag of the dtype is a number.
        warnings.simplefilter("ignore")
        content = pickle.loads(python2_pickle(pixels, labels, b"labels"), encoding="bytes")
    assert content.keys() == {b"batch_label", b"labels", b"data", b"filenames"}
    np.testing.assert_array_equal(content[b"data"], pixels, strict=True)
    assert content[b"labels"] == labels


@pytest.mark.parametrize("below", [False, True], ids=["itself", "parent"])
@pytest.mark.parametrize("write", _WRITERS)
@pytest.mark.parametrize("name", _NAMES)
def test_both_layouts_are_read(name: str, write, below: bool, tmp_path: Path) -> None:
    own = write(name, tmp_path)
    images = cifar.read(small(name), tmp_path if below else own)
    train_x, train_y, test_x, test_y = _expected(name)
    for found, wanted in ((images.train_x, train_x), (images.test_x, test_x)):
        assert found.dtype == torch.uint8
        assert torch.equal(found, torch.from_numpy(wanted).view(-1, 3, 32, 32))
    assert images.train_y.tolist() == train_y
    assert images.test_y.tolist() == test_y
    assert images.train_y.dtype == torch.int64


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_pickles_of_the_installed_numpy(protocol: int, tmp_path: Path) -> None:
    """Bytes of protocol 2 are a call of a codec, which the published files do not make."""
    folder = write_python("cifar10", tmp_path)
    pixels, labels = contents("cifar10")["test_batch"]
    for array in (pixels, np.asfortranarray(pixels)):
        content = {b"data": array, b"labels": labels}
        (folder / "test_batch").write_bytes(pickle.dumps(content, protocol))
        if protocol == 2:
            with pytest.raises(ValueError, match=r"test_batch .*it names _codecs.encode"):
                cifar.read(small("cifar10"), folder)
        else:
            images = cifar.read(small("cifar10"), folder)
            assert torch.equal(images.test_x.flatten(1), torch.from_numpy(pixels))


@pytest.mark.parametrize("name", _NAMES)
def test_data_set_is_split_and_normalised(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(cifar.PUBLISHED, name, small(name))
    write_python(name, tmp_path / "python")
    write_binary(name, tmp_path / "binary")
    data, again = load(name, tmp_path / "python"), load(name, tmp_path / "binary")
    train_x, train_y, test_x, test_y = _expected(name)
    count = len(train_y)
    for part, other, size in (
        (data.train, again.train, count - count // 10),
        (data.validation, again.validation, count // 10),
        (data.test, again.test, len(test_y)),
    ):
        assert part.x.shape == (size, 3, 32, 32)
        assert part.x.dtype == torch.float32
        assert torch.equal(part.x, other.x)
        assert torch.equal(part.y, other.y)
    assert (data.name, data.classes, data.augmented) == (name, len(set(train_y)), True)
    # Every class has the same share of both parts.
    assert set(data.validation.y.bincount().tolist()) == {count // 10 // data.classes}
    assert set(data.train.y.bincount().tolist()) == {(count - count // 10) // data.classes}
    # The map to pixels, from the test part, takes the other parts to the images of the files.
    pixels = torch.from_numpy(test_x).view(-1, 3, 32, 32).double()
    scale = pixels.std((0, 2, 3)) / data.test.x.double().std((0, 2, 3))
    shift = pixels.mean((0, 2, 3)) - scale * data.test.x.double().mean((0, 2, 3))
    assert data.test.y.tolist() == test_y
    x = torch.cat([data.train.x, data.validation.x]) * scale.view(3, 1, 1) + shift.view(3, 1, 1)
    y = torch.cat([data.train.y, data.validation.y]).tolist()
    assert (x - x.round()).abs().max() < 1e-3
    found = list(zip(map(bytes, x.round().byte().flatten(1).numpy()), y, strict=True))
    assert sorted(found) == sorted(zip(map(bytes, train_x), train_y, strict=True))
    assert len(set(found)) == count
    train = data.train.x.double()
    torch.testing.assert_close(train.mean((0, 2, 3)), torch.zeros(3).double(), rtol=0, atol=1e-6)
    deviation = train.std((0, 2, 3), correction=0)
    torch.testing.assert_close(deviation, torch.ones(3).double(), rtol=0, atol=1e-6)


class _Call:
    """Pickles as a call."""

    def __init__(self, function, *arguments) -> None:
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("made", "named"),
    [
        (_Call(os.mkdir, "made-by-a-pickle"), r"(posix|nt)\.mkdir"),
        (
            _Call(eval, "__import__('os').mkdir('made-by-a-pickle')"),
            r"(builtins|__builtin__)\.eval",
        ),
        (_Call(getattr, "text", "upper"), r"(builtins|__builtin__)\.getattr"),
        (_Call(np.fromfile, "somewhere"), r"numpy\.fromfile"),
        (Path("somewhere"), r"pathlib\S*\.\w+"),
        (np.float64(1.0), r"numpy\.\w+\.multiarray\.scalar"),
    ],
    ids=["mkdir", "eval", "getattr", "fromfile", "path", "scalar"],
)
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_pickle_that_names_something_else_is_refused(
    made: object, named: str, protocol: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_python("cifar10", tmp_path)
    monkeypatch.chdir(tmp_path)
    (folder / "data_batch_3").write_bytes(pickle.dumps({"data": made}, protocol))
    with pytest.raises(ValueError, match=rf"data_batch_3 .*it names {named}, which CIFAR files"):
        cifar.read(small("cifar10"), folder)
    assert not (tmp_path / "made-by-a-pickle").exists()


@pytest.mark.parametrize(
    "content",
    [
        # Attributes set on a class that is admitted, and one that is called with anything.
        b"cnumpy\nndarray\n}b.",
        b"cnumpy\nndarray\n(N}tb.",
        b"cnumpy\ndtype\n(S'O'\ntR.",
        b"cnumpy.core.multiarray\n_reconstruct\n(tR(I1\n(I-1\nI-3072\ntNI00\nS'x'\ntb.",
        b"\x80\x04\x8c\x05numpy\x8c\x12ndarray.__init__\x93.",
        b"Pidentity\n.",
    ],
)
def test_pickle_made_by_hand_is_refused(content: bytes, tmp_path: Path) -> None:
    folder = write_python("cifar10", tmp_path)
    (folder / "data_batch_1").write_bytes(content)
    with pytest.raises(ValueError, match=r"data_batch_1 cannot be read as a pickle of CIFAR-10"):
        cifar.read(small("cifar10"), folder)


@pytest.mark.parametrize("kept", [0, 1, 20_000, -1])
@pytest.mark.parametrize("name", _NAMES)
def test_truncated_files_are_named(name: str, kept: int, tmp_path: Path) -> None:
    layouts = small(name).layouts
    for write, file in zip(_WRITERS, [layout.train[-1] for layout in layouts], strict=True):
        path = write(name, tmp_path) / file
        path.write_bytes(path.read_bytes()[:kept])
        with pytest.raises(ValueError, match=rf"{file} .*(pickle of CIFAR|expected)") as raised:
            cifar.read(small(name), path.parent)
        assert str(path) in str(raised.value)


def test_binary_file_of_another_size_says_what_was_expected(tmp_path: Path) -> None:
    folder = write_binary("cifar10", tmp_path)
    with pytest.raises(ValueError, match=r"has 122920 bytes, expected 30730000: 10000 images of"):
        cifar.read(cifar.PUBLISHED["cifar10"], folder)


@pytest.mark.parametrize("label", [10, -1, 2**70])
def test_labels_out_of_range_are_named(label: int, tmp_path: Path) -> None:
    pixels, labels = contents("cifar10")["test_batch"]
    folder = write_python("cifar10", tmp_path)
    content = {b"data": pixels, b"labels": [*labels[:-1], label]}
    (folder / "test_batch").write_bytes(pickle.dumps(content, 4))
    with pytest.raises(ValueError, match=rf"test_batch has labels .*{label}.*, expected 0 to 9"):
        cifar.read(small("cifar10"), folder)
    if label != 10:
        return
    path = write_binary("cifar10", tmp_path) / "test_batch.bin"
    content = bytearray(path.read_bytes())
    content[-3073] = label
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"test_batch.bin has labels from 0 to 10, expected 0 to"):
        cifar.read(small("cifar10"), path.parent)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({b"data": np.zeros((30, 3071), np.uint8)}, r"shape \[30, 3071\], expected \[30, 3072\]"),
        ({b"data": np.zeros((30, 3072), np.int8)}, r"dtype 'i1', expected 'u1'"),
        ({b"data": np.array([None])}, r"dtype 'O8', expected 'u1'"),
        ({b"data": [1, 2]}, r"data of shape list, expected"),
        ({b"labels": [1.5] * 30}, r"b'labels' that is not a list of int"),
        ({b"labels": [0] * 29}, r"29 labels, expected 30"),
        ({b"labels": b"0" * 30}, r"b'labels' that is not a list of int"),
    ],
)
def test_contents_of_another_form_are_named(change: dict, message: str, tmp_path: Path) -> None:
    folder = write_python("cifar10", tmp_path)
    pixels, labels = contents("cifar10")["test_batch"]
    content = {b"data": pixels, b"labels": labels} | change
    (folder / "test_batch").write_bytes(pickle.dumps(content, 4))
    with pytest.raises(ValueError, match=rf"test_batch .*{message}"):
        cifar.read(small("cifar10"), folder)


def test_array_of_more_bytes_than_there_are_is_named(tmp_path: Path) -> None:
    folder = write_python("cifar10", tmp_path)
    pixels, labels = contents("cifar10")["test_batch"]
    content = python2_pickle(pixels[:29], labels, b"labels")
    shape, claimed = (b"J" + struct.pack("<i", rows) + b"J\x00\x0c\x00\x00" for rows in (29, 30))
    assert content.count(shape) == 1
    (folder / "test_batch").write_bytes(content.replace(shape, claimed))
    with pytest.raises(ValueError, match=r"an array of shape \(30, 3072\) has 89088 bytes"):
        cifar.read(small("cifar10"), folder)


def test_pickle_of_the_other_data_set_is_named(tmp_path: Path) -> None:
    folder = write_python("cifar100", tmp_path)
    wrong = replace(small("cifar100"), key=b"labels")
    with pytest.raises(ValueError, match=r"train is not a dictionary with b'data' and b'labels'"):
        cifar.read(wrong, folder)


@pytest.mark.parametrize("name", _NAMES)
def test_missing_folder_says_what_to_download(name: str, tmp_path: Path) -> None:
    published = cifar.PUBLISHED[name]
    names = [text for layout in published.layouts for text in (layout.archive, layout.folder)]
    for folder in (None, tmp_path / "nowhere", tmp_path):
        with pytest.raises(FileNotFoundError) as raised:
            load(name, folder)
        message = str(raised.value)
        assert str(folder) in message
        for text in (*names, "https://www.cs.toronto.edu/~kriz/cifar.html"):
            assert text in message


@pytest.mark.parametrize("write", _WRITERS)
def test_missing_file_is_named(write, tmp_path: Path) -> None:
    folder = write("cifar10", tmp_path)
    suffix = ".bin" if write is write_binary else ""
    (folder / f"data_batch_4{suffix}").unlink()
    message = rf"has no data_batch_4{suffix}; download"
    for given in (folder, tmp_path):
        with pytest.raises(FileNotFoundError, match=message):
            cifar.read(small("cifar10"), given)
    with pytest.raises(FileNotFoundError, match=message):
        cifar.read(small("cifar10"), folder.rename(tmp_path / "renamed"))


def test_complete_layout_is_preferred(tmp_path: Path) -> None:
    (write_python("cifar10", tmp_path) / "test_batch").unlink()
    write_binary("cifar10", tmp_path)
    assert cifar.read(small("cifar10"), tmp_path).test_y.tolist() == _expected("cifar10")[3]


def test_archive_that_is_not_unpacked_is_named(tmp_path: Path) -> None:
    archive = tmp_path / "cifar-10-binary.tar.gz"
    archive.touch()
    with pytest.raises(FileNotFoundError, match=r"binary.tar.gz is not unpacked; run: tar -xzf"):
        load("cifar10", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"binary.tar.gz, not a folder; .*unpack it"):
        load("cifar10", archive)
