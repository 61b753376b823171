"""Training with Lightning equals the same loop by hand, bit for bit unless it says otherwise."""

from __future__ import annotations

from contextlib import nullcontext
from multiprocessing import get_all_start_methods
from pathlib import Path
from typing import Any

import pytest
import torch
from by_hand import assert_same, network, samples, train_by_hand, windows
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

from wsam_fused import BSAM, ESAM, SAM, WSAM

pytest.importorskip("lightning", reason="Lightning is not installed")

import torchmetrics
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision

from wsam_fused.integrations.lightning import SharpnessAware

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*You defined a `validation_step` but"),
    pytest.mark.filterwarnings("ignore:.*The number of training batches"),
    pytest.mark.filterwarnings("ignore:.*`dataloader_iter`"),
    pytest.mark.filterwarnings("ignore:It is recommended to use .*sync_dist=True"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
]

METHODS = {"sam": SAM, "wsam": WSAM, "bsam": BSAM}
EPOCHS = 2


def optimizer_of(method: str, trained: nn.Module, **options: Any) -> Any:
    arguments = {"rho": 0.3, "lr": 0.01, "weight_decay": 0.1, **options}
    return METHODS[method](trained.parameters(), torch.optim.AdamW, **arguments)


class Regression(LightningModule):
    def __init__(self, method: str = "wsam", batch_norm: bool = False, **options: Any) -> None:
        super().__init__()
        self.model = network(batch_norm)
        self.error = torchmetrics.MeanSquaredError(num_outputs=2).double()
        self.method = method
        self.options = options
        self.evaluations = 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.evaluations += 1
        x, y = batch
        output = self.model(x.to(self.dtype))
        loss = mse_loss(output, y.to(output.dtype))
        self.error.update(output.detach().double(), y.double())
        self.log("loss", loss, on_step=True, on_epoch=True, batch_size=len(x))
        return loss

    def configure_optimizers(self) -> Any:
        return optimizer_of(self.method, self.model, **self.options)


class Notes(Callback):
    """What a logger, a progress bar or a user would see."""

    def __init__(self) -> None:
        self.outputs: list[Tensor] = []
        self.logged: list[Tensor] = []
        self.epochs: list[Tensor] = []
        self.seen: list[int] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *rest: Any) -> None:
        self.outputs.append(outputs["loss"].clone())
        self.logged.append(trainer.callback_metrics["loss_step"].clone())

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        self.epochs.append(trainer.callback_metrics["loss_epoch"].clone())
        self.seen.append(int(module.error.total))
        module.error.reset()


def loader(size: int) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*samples()), batch_size=size)


def fit(
    module: LightningModule, size: int, *callbacks: Callback, path: Any = None, **options: Any
) -> Trainer:
    arguments: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "precision": "64-true",
        "max_epochs": EPOCHS,
        "logger": False,
        "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        **options,
    }
    if "plugins" in arguments:
        del arguments["precision"]
    trainer = Trainer(callbacks=list(callbacks), **arguments)
    trainer.fit(module, loader(size), ckpt_path=path)
    return trainer


def expected_of(method: str, size: int, parts: int = 1, **options: Any) -> nn.Module:
    model = network()
    optimizer = optimizer_of(method, model, **options)
    steps = windows(size, parts) * EPOCHS
    train_by_hand(optimizer, steps, lambda x, y: mse_loss(model(x), y), parts=parts)
    return model


@pytest.mark.parametrize("callbacks", [(), (SharpnessAware,)], ids=["alone", "callback"])
@pytest.mark.parametrize("method", list(METHODS))
def test_plain_training_needs_nothing(method: str, callbacks: tuple[Any, ...]) -> None:
    module = Regression(method)
    trainer = fit(module, 8, *(make() for make in callbacks))
    assert_same(module.model, expected_of(method, 8))
    assert trainer.global_step == 5 * EPOCHS
    assert module.evaluations == 5 * EPOCHS * METHODS[method].evaluations


def test_bfloat16_autocast() -> None:
    module = Regression()
    module.model.float()
    fit(module, 8, SharpnessAware(), precision="bf16-mixed")
    model = network().float()

    def loss_of(x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            output = model(x.float())
            return mse_loss(output, y.to(output.dtype))

    train_by_hand(optimizer_of("wsam", model), windows(8, 1) * EPOCHS, loss_of)
    assert_same(module.model, model)


@pytest.mark.parametrize("method", list(METHODS))
def test_accumulation_evaluates_all_micro_batches_again(method: str) -> None:
    """Of the ten micro-batches of an epoch, the last is a step of its own."""
    module = Regression(method)
    trainer = fit(module, 4, SharpnessAware(), accumulate_grad_batches=3)
    assert_same(module.model, expected_of(method, 4, 3))
    assert trainer.global_step == 4 * EPOCHS
    assert module.evaluations == 10 * EPOCHS * METHODS[method].evaluations


def test_accumulation_equals_one_large_batch() -> None:
    module = Regression()
    fit(module, 4, SharpnessAware(), accumulate_grad_batches=2)
    large = expected_of("wsam", 8)
    for found, wanted in zip(module.model.parameters(), large.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-13)


def test_accumulation_without_the_callback_warns() -> None:
    with pytest.warns(UserWarning, match="earlier micro-batches, they are lost"):
        fit(Regression(), 4, accumulate_grad_batches=2)


def test_plain_steps_between_accumulate_too() -> None:
    module = Regression(every=2)
    fit(module, 4, SharpnessAware(), accumulate_grad_batches=2)
    assert_same(module.model, expected_of("wsam", 4, 2, every=2))
    assert module.evaluations == 10 * EPOCHS + 10


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_clipping_is_that_of_each_gradient(algorithm: str) -> None:
    module = Regression()
    clipping = {"gradient_clip_val": 0.2, "gradient_clip_algorithm": algorithm}
    fit(module, 4, SharpnessAware(), accumulate_grad_batches=2, **clipping)
    model = network()
    params = list(model.parameters())
    clip = {
        "norm": lambda: nn.utils.clip_grad_norm_(params, 0.2),
        "value": lambda: nn.utils.clip_grad_value_(params, 0.2),
    }[algorithm]
    steps = windows(4, 2) * EPOCHS
    optimizer = optimizer_of("wsam", model)
    train_by_hand(optimizer, steps, lambda x, y: mse_loss(model(x), y), parts=2, clip=clip)
    assert_same(module.model, model)
    inside = expected_of("wsam", 4, 2, max_grad_norm=0.2)
    pairs = zip(module.model.parameters(), inside.parameters(), strict=True)
    near = all(torch.allclose(a, b, rtol=0, atol=1e-5) for a, b in pairs)
    assert near == (algorithm == "norm")


@pytest.mark.parametrize("parts", [1, 2])
def test_what_is_logged_is_of_the_unperturbed_weights(parts: int) -> None:
    notes, module = Notes(), Regression()
    fit(module, 4, SharpnessAware(), notes, accumulate_grad_batches=parts)
    model = network()
    losses: list[Tensor] = []

    def loss_of(x: Tensor, y: Tensor) -> Tensor:
        loss = mse_loss(model(x), y)
        losses.append(loss.detach())
        return loss

    optimizer = optimizer_of("wsam", model)
    wanted: list[Tensor] = []
    for window in windows(4, parts) * EPOCHS:
        losses.clear()
        train_by_hand(optimizer, [window], loss_of, parts=parts)
        wanted += losses[: len(window)]
    assert torch.equal(torch.stack(notes.logged), torch.stack(wanted))
    assert torch.equal(torch.stack(notes.outputs), torch.stack(wanted) / parts)
    for epoch, mean in enumerate(notes.epochs):
        found = torch.stack(wanted[10 * epoch : 10 * epoch + 10]).mean()
        torch.testing.assert_close(mean.double(), found, rtol=1e-6, atol=0)
    assert notes.seen == [40] * EPOCHS


def test_what_is_logged_without_the_callback_is_not() -> None:
    notes, module = Notes(), Regression()
    fit(module, 4, notes)
    model = network()
    optimizer = optimizer_of("wsam", model)
    perturbed: list[Tensor] = []
    note = lambda: perturbed.append(optimizer.last.perturbed_loss)  # noqa: E731
    steps = windows(4, 1) * EPOCHS
    train_by_hand(optimizer, steps, lambda x, y: mse_loss(model(x), y), after_step=note)
    assert torch.equal(torch.stack(notes.logged), torch.stack(perturbed))
    assert notes.seen == [80] * EPOCHS


class Manual(Regression):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        optimizer = self.optimizers()

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = mse_loss(self.model(batch[0]), batch[1])
            self.manual_backward(loss)
            return loss

        optimizer.step(closure)


def test_manual_optimization() -> None:
    module = Manual()
    trainer = fit(module, 8)
    assert_same(module.model, expected_of("wsam", 8))
    assert trainer.global_step == 5 * EPOCHS


def test_batch_norm_counts_once() -> None:
    module = Regression(batch_norm=True)
    module.options["model"] = module.model
    fit(module, 4, SharpnessAware(), accumulate_grad_batches=2)
    model = network(batch_norm=True)
    optimizer = optimizer_of("wsam", model, model=model)
    steps = windows(4, 2) * EPOCHS
    train_by_hand(optimizer, steps, lambda x, y: mse_loss(model(x), y), parts=2)
    assert_same(module.model, model)
    assert int(module.model[1].num_batches_tracked) == 10 * EPOCHS


def scheduled(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)


class Scheduled(Regression):
    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        schedule = {"scheduler": scheduled(optimizer), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": schedule}


def test_schedulers_and_checkpoints(tmp_path: Path) -> None:
    """A run that is resumed goes on as the uninterrupted one, which equals that by hand."""
    module = Scheduled()
    trainer = fit(module, 4, SharpnessAware(), accumulate_grad_batches=2)
    model = network()
    optimizer = optimizer_of("wsam", model)
    schedule = scheduled(optimizer)
    steps = windows(4, 2) * EPOCHS
    loss_of = lambda x, y: mse_loss(model(x), y)  # noqa: E731
    train_by_hand(optimizer, steps, loss_of, parts=2, after_step=schedule.step)
    assert_same(module.model, model)
    assert trainer.optimizers[0].param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]

    first = ModelCheckpoint(dirpath=tmp_path / "first", filename="first")
    options = {"accumulate_grad_batches": 2, "default_root_dir": tmp_path}
    fit(Scheduled(), 4, SharpnessAware(), first, max_epochs=1, **options)
    resumed = Scheduled()
    again = ModelCheckpoint(dirpath=tmp_path / "second", filename="second")
    trainer = fit(resumed, 4, SharpnessAware(), again, path=first.best_model_path, **options)
    assert_same(resumed.model, model)
    assert trainer.global_step == 5 * EPOCHS
    states = zip(trainer.optimizers[0].state.values(), optimizer.state.values(), strict=True)
    for found, wanted in states:
        for key, value in wanted.items():
            assert torch.equal(found[key], value), key


class Fails(Regression):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.evaluations == 7:  # in the second evaluation of the second step
            self.before = [p.detach().clone() for p in self.model.parameters()]
            raise RuntimeError("no memory")
        return super().training_step(batch, batch_idx)


def test_an_exception_restores_the_weights_and_the_module() -> None:
    module = Fails(restore="backup")
    with pytest.raises(RuntimeError, match="no memory"):
        fit(module, 4, SharpnessAware(), accumulate_grad_batches=2)
    model = network()
    optimizer = optimizer_of("wsam", model, restore="backup")
    train_by_hand(optimizer, windows(4, 2)[:1], lambda x, y: mse_loss(model(x), y), parts=2)
    assert_same(module.model, model)
    assert not all(
        torch.equal(p, at) for p, at in zip(module.model.parameters(), module.before, strict=True)
    )
    assert "optimizer_step" not in vars(module)
    assert "log" not in vars(module)


class Iterates(Regression):
    def training_step(self, dataloader_iter: Any) -> Tensor:
        return super().training_step(next(dataloader_iter)[0], 0)


class WithoutSAM(Regression):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class PerSample(Regression):
    def configure_optimizers(self) -> Any:
        return ESAM(self.parameters(), torch.optim.SGD, lr=0.1)


@pytest.mark.parametrize(
    ("module", "options", "error", "message"),
    [
        (Iterates, {}, ValueError, "training_step takes dataloader_iter, expected batch"),
        (Manual, {}, ValueError, "automatic_optimization is False, expected True"),
        (
            WithoutSAM,
            {},
            TypeError,
            "the module's optimizer is SGD, expected an optimizer of wsam_fused",
        ),
        (PerSample, {}, TypeError, "is ESAM, which needs the loss of every sample"),
    ],
    ids=["iterator", "manual", "another optimizer", "per sample"],
)
def test_what_cannot_work_is_refused(
    module: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        fit(module(), 4, SharpnessAware(), **options)


def test_float16_without_the_callback_is_refused() -> None:
    module = Regression()
    module.model.float()
    with pytest.raises(RuntimeError, match=r"docs/use_with\.md"):
        fit(module, 4, plugins=[MixedPrecision("16-mixed", "cpu")])


class Scaling(MixedPrecision):
    """The plugin of "16-mixed" on a CPU, but for the autocast: losses are scaled, in float64."""

    def __init__(self, scale: float) -> None:
        super().__init__("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale))

    def forward_context(self) -> Any:
        return nullcontext()


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("method", list(METHODS))
def test_scaled_losses(method: str, parts: int) -> None:
    module = Regression(method).double()
    plugin = Scaling(2.0**10)
    fit(module, 8, SharpnessAware(), accumulate_grad_batches=parts, plugins=[plugin])
    assert_same(module.model, expected_of(method, 8, parts))
    assert module.evaluations == 5 * EPOCHS * METHODS[method].evaluations


class Overflows(Regression):
    """An infinite loss in one evaluation of the second step."""

    def __init__(self, evaluation: int) -> None:
        super().__init__("wsam", restore="backup")
        self.poisoned = METHODS["wsam"].evaluations + evaluation
        self.weights: list[Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        infinite = self.evaluations == self.poisoned
        loss: Tensor = super().training_step(batch, batch_idx)
        return loss * float("inf") if infinite else loss

    def on_train_batch_end(self, *args: Any) -> None:
        self.weights.append(torch.cat([p.detach().flatten() for p in self.model.parameters()]))


@pytest.mark.parametrize("evaluation", [0, 1])
def test_an_overflow_skips_the_step_and_lowers_the_scale(evaluation: int) -> None:
    module, plugin = Overflows(evaluation).double(), Scaling(2.0**10)
    fit(module, 8, SharpnessAware(), plugins=[plugin], max_epochs=1)
    assert torch.equal(module.weights[1], module.weights[0])
    assert not torch.equal(module.weights[2], module.weights[1])
    assert plugin.scaler is not None
    assert plugin.scaler.get_scale() == 2.0**9


class Half(Regression):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        parts = [tensor.chunk(self.trainer.world_size) for tensor in batch]
        return super().training_step([part[self.trainer.global_rank] for part in parts], batch_idx)


@pytest.mark.skipif("fork" not in get_all_start_methods(), reason="processes cannot be forked")
def test_two_processes_equal_one() -> None:
    """Each takes half of every micro-batch; only with the last one are gradients averaged."""
    module = Half()
    options = {"strategy": "ddp_fork", "devices": 2, "use_distributed_sampler": False}
    fit(module, 4, SharpnessAware(), accumulate_grad_batches=2, **options)
    expected = expected_of("wsam", 4, 2)
    for found, wanted in zip(module.model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-13)
