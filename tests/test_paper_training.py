"""A run of the papers' experiments trains what its spec says, and the same every time."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest
import torch
from torch.optim import SGD

pytest.importorskip("sklearn", reason="the runs train on scikit-learn's data sets")
pytest.importorskip("matplotlib", reason="the experiments draw pictures")
pytest.importorskip("tqdm", reason="the experiments show progress bars")

from benchmarks.paper import agreement, methods, training
from benchmarks.paper.runs import Spec
from wsam_fused import landscape

BASE = Spec("breast-cancer", "resnet-tabular", "SAM", (("rho", 0.1),), 0.05, 1e-3, 2, 20, 0)
HYPER: dict[str, dict[str, float]] = {"SGDM": {}, **agreement.HYPER, "m-SAM": {"rho": 0.1, "m": 5}}


def _spec(method: str, **changes: object) -> Spec:
    spec = replace(BASE, method=method, hyper=tuple(sorted(HYPER[method].items())))
    return replace(spec, **changes)  # type: ignore[arg-type]


def _weights(spec: Spec) -> torch.Tensor:
    torch.manual_seed(12345)  # nothing may depend on the state of before
    net = training.train(spec, training.prepared(spec, None, "cpu"), None, "cpu")
    return torch.cat([param.detach().flatten() for param in net.parameters()])


def test_every_method_is_tried() -> None:
    assert set(HYPER) == set(methods.METHODS)


@pytest.mark.parametrize("method", HYPER)
def test_run_is_reproduced_and_its_seed_matters(method: str) -> None:
    spec = _spec(method)
    weights = _weights(spec)
    assert torch.equal(_weights(spec), weights)
    assert not torch.equal(_weights(replace(spec, seed=1)), weights)


def test_methods_differ() -> None:
    found = {method: _weights(_spec(method)) for method in HYPER}
    names = list(found)
    for number, left in enumerate(names):
        for right in names[number + 1 :]:
            assert not torch.equal(found[left], found[right]), (left, right)


def test_sgdm_is_torchs() -> None:
    spec = _spec("SGDM", dtype="float64")
    data = training.prepared(spec, None, "cpu")
    net = training.fresh_network(spec, data, spec.seed, "cpu")
    optimizer = SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20)
    for x, y in training.batches(spec, data, 10):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
        schedule.step()
    expected = torch.cat([param.detach().flatten() for param in net.parameters()])
    assert torch.equal(_weights(spec), expected)


def test_n_sam_and_m_sam_are_sam_where_the_samples_are_the_same() -> None:
    """float64; the sums run in another order, and training amplifies that."""
    whole = _spec("SAM", batch_size=200, dtype="float64")
    sam = _weights(whole)
    whole_m = replace(whole, method="m-SAM", hyper=(("m", 200), ("rho", 0.1)))
    assert torch.allclose(_weights(whole_m), sam, rtol=1e-9, atol=1e-12)
    assert torch.allclose(_weights(replace(whole, method="n-SAM")), sam, rtol=1e-9, atol=1e-12)


def test_a_smaller_last_batch_is_left_out() -> None:
    spec = _spec("SAM", batch_size=30)
    batches = list(training.batches(spec, training.prepared(spec, None, "cpu"), 200 // 30))
    assert len(batches) == 2 * 6
    assert {len(y) for _, y in batches} == {30}


def test_label_noise_is_in_the_training_set_only() -> None:
    clean = training.prepared(BASE, None, "cpu")
    noisy = training.prepared(replace(BASE, label_noise=0.4), None, "cpu")
    other = training.prepared(replace(BASE, label_noise=0.4, seed=1), None, "cpu")
    assert not torch.equal(noisy.train.y, clean.train.y)
    assert not torch.equal(noisy.train.y, other.train.y)
    assert torch.equal(noisy.validation.y, clean.validation.y)
    assert torch.equal(noisy.test.y, clean.test.y)


def test_pretrained_run_starts_where_the_pretraining_ended() -> None:
    still = _spec("SGDM", lr=0.0, weight_decay=0.0, pretrained=3)
    start = _weights(still)
    assert torch.equal(_weights(replace(still, seed=1)), start)
    assert not torch.equal(_weights(replace(still, pretrained=4)), start)
    assert not torch.equal(_weights(replace(still, lr=0.01)), start)


def test_outcome_is_that_of_the_network() -> None:
    spec = _spec("WSAM", minimum=True)
    outcome = training.run(spec)
    data = training.prepared(spec, None, "cpu")
    net = training.train(spec, data, None, "cpu").eval()

    def loss() -> torch.Tensor:
        return torch.nn.functional.cross_entropy(net(data.train.x), data.train.y)

    hits = (net(data.test.x).argmax(1) == data.test.y).double().mean().item()
    assert outcome.test_accuracy == pytest.approx(100.0 * hits, abs=1e-9)
    assert outcome.train_loss == pytest.approx(loss().item(), rel=1e-5)
    assert outcome.sharpness == pytest.approx(landscape.sharpness(net, loss, 0.1), rel=1e-3)
    top = landscape.hessian_max_eigenvalue(net, loss)
    assert outcome.hessian_max_eigenvalue == pytest.approx(top, rel=1e-2)
    assert outcome.gradient_noise_trace is not None
    assert outcome.gradient_noise_trace > 0.0
    without = training.run(_spec("WSAM"))
    figures = {**asdict(outcome), "seconds": 0.0}
    names = ("sharpness", "hessian_max_eigenvalue", "gradient_noise_trace")
    assert {**asdict(without), "seconds": 0.0} == {**figures, **dict.fromkeys(names)}
