"""The data sets of the paper experiments: their parts, scales and label noise."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("sklearn", reason="two of the data sets come with scikit-learn")

from sklearn.datasets import load_breast_cancer, load_digits

from benchmarks.paper.data import Dataset, augment, load, with_label_noise

_SIZES = {"digits": (400, 397, 1000), "breast-cancer": (200, 119, 250)}


def _parts(data: Dataset) -> tuple:
    return data.train, data.validation, data.test


@pytest.mark.parametrize("name", _SIZES)
def test_parts_have_their_sizes_and_types(name: str) -> None:
    data = load(name)
    assert load(name) is data
    assert data.name == name
    assert not data.augmented
    for part, size in zip(_parts(data), _SIZES[name], strict=True):
        assert part.x.shape == (size, *((1, 8, 8) if name == "digits" else (30,)))
        assert part.x.dtype == torch.float32
        assert part.y.shape == (size,)
        assert part.y.dtype == torch.int64
        assert part.y.unique().tolist() == list(range(data.classes))


@pytest.mark.parametrize("name", _SIZES)
def test_classes_have_the_same_share_in_every_part(name: str) -> None:
    data = load(name)
    everything = torch.cat([part.y for part in _parts(data)])
    shares = everything.bincount() / len(everything)
    for part in _parts(data):
        # Stratified twice, each time to within one sample of every class.
        assert (part.y.bincount() - shares * len(part.y)).abs().max() < 2.0


def test_every_digit_is_in_one_part() -> None:
    images, labels = load_digits(return_X_y=True)
    data = load("digits")
    x = torch.cat([part.x for part in _parts(data)]).flatten(1)
    # Pixels are sixteenths, and 0.3 is taken off: exact again after rounding.
    pixels = ((x + 0.3) * 16).round().long()
    y = torch.cat([part.y for part in _parts(data)])
    found = torch.cat([pixels, y[:, None]], 1).tolist()
    original = torch.from_numpy(images).long()
    wanted = torch.cat([original, torch.from_numpy(labels)[:, None]], 1).tolist()
    assert sorted(found) == sorted(wanted)
    assert len(original.unique(dim=0)) == len(original)  # else one could be in two parts


def test_every_patient_is_in_one_part_standardised_by_the_training_part() -> None:
    features, labels = load_breast_cancer(return_X_y=True)
    data = load("breast-cancer")
    torch.testing.assert_close(data.train.x.mean(0), torch.zeros(30), rtol=0.0, atol=1e-5)
    deviation = data.train.x.std(0, correction=0)
    torch.testing.assert_close(deviation, torch.ones(30), rtol=1e-5, atol=0.0)
    # Scaling is one affine map a feature, for all parts: ranks over all samples are kept.
    x = torch.cat([part.x for part in _parts(data)]).double()
    y = torch.cat([part.y for part in _parts(data)])
    original = torch.from_numpy(features)
    scaled = (original - original.mean(0)) / original.std(0)
    again = (x - x.mean(0)) / x.std(0)
    order, wanted = (part[:, 0].add(part[:, 21], alpha=0.37).argsort() for part in (again, scaled))
    torch.testing.assert_close(again[order], scaled[wanted], rtol=0.0, atol=1e-5)
    assert torch.equal(y[order], torch.from_numpy(labels)[wanted])
    assert len(original.unique(dim=0)) == len(original)


@pytest.mark.parametrize("share", [0.0, 0.2, 0.8, 1.0])
def test_noise_changes_its_share_of_the_training_labels_only(share: float) -> None:
    data = load("digits")
    before = data.train.y.clone()
    noisy = with_label_noise(data, share, seed=0)
    assert torch.equal(data.train.y, before)
    assert noisy.train.x is data.train.x
    assert noisy.validation is data.validation
    assert noisy.test is data.test
    wrong = (noisy.train.y != before).sum().item()
    drawn = round(share * 400)
    # Each is another class with probability 0.9; five standard deviations of that number.
    assert wrong <= drawn
    assert wrong == pytest.approx(0.9 * drawn, abs=5 * (0.09 * drawn) ** 0.5)
    assert noisy.train.y.min() >= 0
    assert noisy.train.y.max() <= 9


def test_noise_is_uniform_over_all_classes() -> None:
    labels = torch.cat([with_label_noise(load("digits"), 1.0, seed).train.y for seed in range(20)])
    expected = 8000 / 10
    # The 1 - 1e-6 quantile of chi squared with 9 degrees of freedom is 45.
    assert ((labels.bincount(minlength=10) - expected) ** 2 / expected).sum() < 45.0


def test_noise_comes_from_the_seed_and_grows_with_the_share() -> None:
    data = load("digits")
    state = torch.get_rng_state()
    few, again, many = (with_label_noise(data, share, 1).train.y for share in (0.2, 0.2, 0.6))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(few, again)
    assert not torch.equal(few, with_label_noise(data, 0.2, seed=2).train.y)
    changed = few != data.train.y
    assert torch.equal(many[changed], few[changed])
    assert (many != data.train.y).sum() > changed.sum()


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_share_of_noise_is_checked(share: float) -> None:
    with pytest.raises(ValueError, match=r"share is .*, expected a number in \[0, 1\]"):
        with_label_noise(load("digits"), share, seed=0)


def test_unknown_name_is_named() -> None:
    with pytest.raises(ValueError, match=r"name is 'mnist', expected one of digits"):
        load("mnist")


def _numbered(batch: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return images whose values count up from 1, so that no pixel is like another."""
    return torch.arange(1, batch * 3 * 32 * 32 + 1).to(dtype).view(batch, 3, 32, 32)


def test_every_augmented_image_is_a_shifted_window_maybe_mirrored() -> None:
    x = _numbered(1500, torch.float64)
    before = x.clone()
    crops = augment(x, torch.Generator().manual_seed(0))
    assert torch.equal(x, before)
    assert crops.shape == x.shape
    assert crops.is_contiguous()
    counts = torch.zeros(9, 9, 2)
    padded = torch.zeros(1500, 3, 40, 40, dtype=torch.float64)
    padded[:, :, 4:36, 4:36] = x
    for crop, source, whole in zip(crops, x, padded, strict=True):
        # The middle is inside every window; where its pixel came from tells the place.
        offset = int(crop[0, 15, 15] - source[0, 0, 0])
        along = int(crop[0, 15, 16] - crop[0, 15, 15])
        assert along in (-1, 1)
        row, column = divmod(offset, 32)
        top, left = row + 4 - 15, column + 4 - (15 if along == 1 else 16)
        window = whole[:, top : top + 32, left : left + 32]
        assert torch.equal(crop, window if along == 1 else window.flip(2))
        counts[top, left, (1 - along) // 2] += 1
    # Chi squared, all 162 outcomes equally likely: its 1 - 1e-6 quantile with 161 degrees is 261.
    expected = 1500 / 162
    assert ((counts - expected) ** 2 / expected).sum() < 261


def test_augmentation_comes_from_its_generator() -> None:
    x = _numbered(16)
    state = torch.get_rng_state()
    generator = torch.Generator().manual_seed(5)
    first, second = augment(x, generator), augment(x, generator)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(augment(x, torch.Generator().manual_seed(5)), first)
    assert not torch.equal(first, second)
    assert not torch.equal(augment(x, torch.Generator().manual_seed(6)), first)


def test_augmentation_keeps_dtype_and_takes_other_layouts() -> None:
    x = _numbered(4, torch.float64)
    wanted = augment(x, torch.Generator().manual_seed(0))
    assert wanted.dtype == torch.float64
    last = x.contiguous(memory_format=torch.channels_last)
    assert torch.equal(augment(last, torch.Generator().manual_seed(0)), wanted)
    assert augment(x[:0], torch.Generator()).shape == (0, 3, 32, 32)
    with pytest.raises(ValueError, match=r"x has shape \[3, 32, 32\], expected \[b, channels"):
        augment(x[0], torch.Generator())
