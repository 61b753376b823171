"""One training run: what decides it, and what is noted of it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from typing import Any

Hyper = tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Spec:
    """All that decides a training run. Equal specs give equal runs on one machine.

    Attributes:
        dataset: A name of :data:`benchmarks.paper.data.DATASETS`.
        model: A name of :data:`benchmarks.paper.networks.NETWORKS`.
        method: A name of :data:`benchmarks.paper.methods.METHODS`.
        hyper: Hyper-parameters of the method, sorted by name.
        lr: Learning rate at the beginning; it falls to 0 as a cosine.
        weight_decay: Of SGD.
        epochs: Passes over the training set.
        batch_size: Samples of a mini-batch; a smaller last one of an epoch is left out.
        seed: Of the starting weights, the order of the samples, and the method's random numbers.
        label_noise: Share of the training labels drawn anew.
        pretrained: Start from a network trained with SGDM for so many epochs; 0: a fresh one.
        minimum: Note also what the minimum is like: sharpness, Hessian, gradient noise.
        dtype: Of weights and data.
        backend: Of the method.
    """

    dataset: str
    model: str
    method: str
    hyper: Hyper
    lr: float
    weight_decay: float
    epochs: int
    batch_size: int
    seed: int
    label_noise: float = 0.0
    pretrained: int = 0
    minimum: bool = False
    dtype: str = "float32"
    backend: str = "auto"

    def key(self) -> str:
        """Return the spec as one line of text, the same for equal specs."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))

    def given(self, **hyper: Any) -> Spec:
        """Return the spec with some hyper-parameters of the method set."""
        return replace(self, hyper=tuple(sorted({**dict(self.hyper), **hyper}.items())))


@dataclass(frozen=True)
class Outcome:
    """What a run ended with; losses and accuracies (in per cent) in evaluation mode.

    The minimum's figures are None where the spec does not ask for them.

    Attributes:
        train_loss: Mean cross entropy over the training set, with its noisy labels.
        train_accuracy: On the same.
        validation_loss: Over the validation set.
        validation_accuracy: On the same.
        test_accuracy: On the test set.
        sharpness: L(w + e) - L(w) over the training set, for rho 0.1.
        hessian_max_eigenvalue: Of the Hessian of the training loss.
        gradient_noise_trace: Trace of the covariance of the samples' gradients.
        seconds: Of the training.
    """

    train_loss: float
    train_accuracy: float
    validation_loss: float
    validation_accuracy: float
    test_accuracy: float
    sharpness: float | None
    hessian_max_eigenvalue: float | None
    gradient_noise_trace: float | None
    seconds: float

    @property
    def test_error(self) -> float:
        """Top-1 error in per cent."""
        return 100.0 - self.test_accuracy
