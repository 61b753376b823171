"""The data sets of the paper experiments, split in the same way every time."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_breast_cancer, load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.nn.functional import pad

from benchmarks.paper import cifar

DATASETS = {
    "digits": "scikit-learn's digits: 8x8 grey images, 10 classes, 400/397/1000",
    "breast-cancer": "scikit-learn's breast cancer: 30 features, 2 classes, 200/119/250",
    "cifar10": "CIFAR-10 from a folder: 32x32 colour images, 10 classes, 45000/5000/10000",
    "cifar100": "CIFAR-100 from a folder: 32x32 colour images, 100 classes, 45000/5000/10000",
}


# Pixels of zeros that are added on every side of an image before it is cropped.
_MARGIN = 4


@dataclass(frozen=True)
class Split:
    """Samples ``x`` [n, ...], float32, and their classes ``y`` [n], int64."""

    x: Tensor
    y: Tensor


@dataclass(frozen=True)
class Dataset:
    """Samples for training, for choosing hyper-parameters, and for testing.

    Attributes:
        name: One of ``DATASETS``.
        classes: Labels are 0 ... classes - 1.
        train: What is trained on; means and deviations for scaling are taken from it alone.
        validation: What hyper-parameters are chosen by.
        test: What is reported, and nothing is chosen by.
        augmented: Whether training batches go through :func:`augment`.
    """

    name: str
    classes: int
    train: Split
    validation: Split
    test: Split
    augmented: bool


@functools.cache
def load(name: str, folder: Path | None = None) -> Dataset:
    """Return a data set. It is kept: nobody may write to its tensors.

    Args:
        name: One of ``DATASETS``.
        folder: Where CIFAR is, see :func:`benchmarks.paper.cifar.read`; unused by data sets that
            come with scikit-learn.

    Raises:
        ValueError: Of a name that is not in ``DATASETS``, or a file that is not as published.
        FileNotFoundError: If CIFAR is not in the folder; it says what to download.
    """
    if name not in DATASETS:
        raise ValueError(f"name is {name!r}, expected one of {', '.join(DATASETS)}")
    if name in cifar.PUBLISHED:
        return _cifar(name, folder)
    return _digits() if name == "digits" else _breast_cancer()


def with_label_noise(data: Dataset, share: float, seed: int) -> Dataset:
    """Return the data with symmetric label noise in its training part.

    A share of the training labels is drawn anew, uniformly over all classes, so that some of them
    stay what they were: share (1 - 1 / classes) of all labels are wrong in the mean. The labels of
    validation and test stay clean. With one seed, a larger share changes what a smaller one
    changes, in the same way, and more.

    Args:
        data: Its tensors are not written; ``x`` is shared with the result.
        share: Of the training labels that are drawn anew, in [0, 1]; their number is rounded.
        seed: Decides which labels, and what they become.

    Raises:
        ValueError: Of a share outside [0, 1].

    Reference:
        Arazo, Ortego, Albert, O'Connor, McGuinness: Unsupervised Label Noise Modeling and Loss
        Correction, ICML 2019, section 4; WSAM paper, section 6.3.
    """
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"share is {share!r}, expected a number in [0, 1]")
    generator = torch.Generator().manual_seed(seed)
    labels = data.train.y.clone()
    chosen = torch.randperm(len(labels), generator=generator)[: round(share * len(labels))]
    # One for every label, also for those that stay: which are drawn does not depend on the share.
    drawn = torch.randint(data.classes, labels.shape, generator=generator)
    labels[chosen] = drawn[chosen]
    return replace(data, train=Split(data.train.x, labels))


def augment(x: Tensor, generator: torch.Generator) -> Tensor:
    """Return every image of a batch cropped at random and, half of them, mirrored.

    As for CIFAR: 4 pixels of zeros are added on all sides, and a window of the old size is taken,
    at each of the 9 x 9 places with the same probability. The zeros are the mean colour of images
    that are normalised.

    Args:
        x: Images [b, channels, height, width] of any floating dtype, on any device; not written.
        generator: What is drawn comes from it. A generator of the CPU gives the same crops on
            every device.

    Raises:
        ValueError: If ``x`` does not have four dimensions.

    Reference:
        He, Zhang, Ren, Sun: Deep Residual Learning for Image Recognition, CVPR 2016, section 4.2.
    """
    if x.dim() != 4:
        raise ValueError(f"x has shape {list(x.shape)}, expected [b, channels, height, width]")
    batch, channels, height, width = x.shape

    def draw(below: int) -> Tensor:
        return torch.randint(below, (batch,), generator=generator, device=generator.device)

    # One transfer for all three, where the generator is not where the images are.
    places = 2 * _MARGIN + 1
    top, left, mirrored = torch.stack([draw(places), draw(places), draw(2)]).to(x.device)
    rows = top[:, None] + torch.arange(height, device=x.device)
    columns = torch.arange(width, device=x.device).expand(batch, width)
    columns = left[:, None] + torch.where(mirrored[:, None] == 1, columns.flip(1), columns)
    images = torch.arange(batch, device=x.device)[:, None, None, None]
    planes = torch.arange(channels, device=x.device)[:, None, None]
    padded = pad(x, [_MARGIN] * 4)
    return padded[images, planes, rows[:, None, :, None], columns[:, None, None, :]]


def _digits() -> Dataset:
    images, labels = load_digits(return_X_y=True)
    train, validation, test = _three_parts(labels, train=400, validation=397)

    def split(part: NDArray[np.int64]) -> Split:
        # Scaled as in benchmarks/demo_model.py: pixels are 0 ... 16, about 0.3 of that in the mean.
        x = torch.from_numpy(images[part]).float().div(16.0).sub(0.3).view(-1, 1, 8, 8)
        return Split(x, torch.from_numpy(labels[part]).long())

    return Dataset("digits", 10, split(train), split(validation), split(test), augmented=False)


def _breast_cancer() -> Dataset:
    features, labels = load_breast_cancer(return_X_y=True)
    train, validation, test = _three_parts(labels, train=200, validation=119)
    mean, deviation = features[train].mean(0), features[train].std(0)

    def split(part: NDArray[np.int64]) -> Split:
        x = torch.from_numpy((features[part] - mean) / deviation).float()
        return Split(x, torch.from_numpy(labels[part]).long())

    parts = split(train), split(validation), split(test)
    return Dataset("breast-cancer", 2, *parts, augmented=False)


def _cifar(name: str, folder: Path | None) -> Dataset:
    """Return CIFAR with a tenth of its training images, of every class, for validation.

    All of it is float32, 737 MB, so that batches are plain indices and a GPU can hold it. Loading
    takes 1.1 GB at its peak: the bytes of the files are there besides until it is done.
    """
    published = cifar.PUBLISHED[name]
    images = cifar.read(published, folder)
    count = len(images.train_y)
    fit, check = train_test_split(
        np.arange(count), test_size=count // 10, random_state=0, stratify=images.train_y.numpy()
    )
    train_x = images.train_x[fit]
    mean, deviation = _channel_statistics(train_x)
    train = Split(_normalised(train_x, mean, deviation), images.train_y[fit])
    validation = Split(_normalised(images.train_x[check], mean, deviation), images.train_y[check])
    test = Split(_normalised(images.test_x, mean, deviation), images.test_y)
    return Dataset(name, published.classes, train, validation, test, augmented=True)


def _channel_statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of every channel, float64 [3, 1, 1], of uint8 images."""
    channels = images.transpose(0, 1)
    # How often each value occurs says it all, exactly, and needs no copy in floating point.
    counts = torch.stack([channel.flatten().bincount(minlength=256) for channel in channels])
    shares = counts.double() / counts.sum(1, keepdim=True)
    values = torch.arange(256, dtype=torch.float64)
    mean = shares @ values
    variance = (shares * (values - mean[:, None]) ** 2).sum(1)
    return mean.view(3, 1, 1), variance.sqrt().view(3, 1, 1)


def _normalised(images: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    """Return (images - mean) / deviation, float32, without another copy of that size."""
    return images.float().sub_(mean.float()).div_(deviation.float())


def _three_parts(
    labels: NDArray[np.int64], train: int, validation: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Return the positions of ``train``, of ``validation`` and of all other samples, stratified."""
    everything = np.arange(len(labels))
    first, test = train_test_split(
        everything, train_size=train + validation, random_state=0, stratify=labels
    )
    fit, check = train_test_split(first, train_size=train, random_state=0, stratify=labels[first])
    return fit, check, test
