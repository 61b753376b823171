"""The Trainer of Transformers equals a loop by hand, bit for bit unless it says otherwise."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from multiprocessing import get_all_start_methods
from pathlib import Path
from typing import Any

import pytest
import torch
from by_hand import assert_same, network, samples, train_by_hand, windows
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.data import SequentialSampler

from wsam_fused import BSAM, ESAM, SAM, WSAM

pytest.importorskip("transformers", reason="Transformers is not installed")
pytest.importorskip("accelerate", reason="Accelerate, which its Trainer needs, is not installed")

import transformers
from accelerate import debug_launcher
from accelerate.state import AcceleratorState, GradientState
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    get_scheduler,
)

from wsam_fused.integrations.transformers import SharpnessAwareTrainer, SharpnessAwareTrainerMixin

METHODS = {"sam": SAM, "wsam": WSAM, "bsam": BSAM}
EPOCHS = 2
OPTIONS = {"rho": 0.3, "lr": 0.01, "weight_decay": 0.1}


@pytest.fixture(autouse=True)
def _forgets() -> Iterator[None]:
    """Trainers of one process share a state."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def optimizer_of(method: str, trained: nn.Module, **options: Any) -> Any:
    return METHODS[method](trained.parameters(), torch.optim.AdamW, **{**OPTIONS, **options})


class Regression(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = network()
        self.evaluations = 0
        self.fails_at = -1

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        if self.evaluations == self.fails_at:
            raise RuntimeError("no memory")
        self.evaluations += self.training
        output = self.net(x)
        return {"loss": mse_loss(output, labels), "logits": output}


class Summed(Regression):
    """Divides by the number of all labels of a step, as language models do."""

    def forward(self, x: Tensor, labels: Tensor, **kwargs: Any) -> dict[str, Tensor]:  # type: ignore[override]
        result = super().forward(x, labels)
        if "num_items_in_batch" in kwargs:
            result["loss"] = result["loss"] * labels.numel() / kwargs["num_items_in_batch"]
        return result


class InOrder(SharpnessAwareTrainer):
    def _get_train_sampler(self, *args: Any) -> Any:
        return SequentialSampler(self.train_dataset)


class Data(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return len(samples()[0])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        x, y = samples()
        return {"x": x[index], "labels": y[index]}


def arguments(path: Path, size: int = 4, parts: int = 2, **options: Any) -> TrainingArguments:
    return TrainingArguments(
        **{
            "output_dir": str(path),
            "use_cpu": True,
            "per_device_train_batch_size": size,
            "gradient_accumulation_steps": parts,
            "num_train_epochs": EPOCHS,
            "max_grad_norm": 0.0,
            "logging_steps": 1,
            "report_to": [],
            "save_strategy": "no",
            "disable_tqdm": True,
            **options,
        }
    )


def trained(
    args: TrainingArguments,
    method: str = "wsam",
    model: Any = None,
    resume: Any = None,
    callbacks: Any = None,
    **options: Any,
) -> InOrder:
    model = model or Regression()
    optimizers = (optimizer_of(method, model, **options), None)
    trainer = InOrder(
        model, args, train_dataset=Data(), eval_dataset=Data(), optimizers=optimizers,
        callbacks=callbacks,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def expected_of(
    method: str, size: int, parts: int, limit: float = 0.0, **options: Any
) -> tuple[nn.Module, list[Tensor]]:
    model = network()
    optimizer = optimizer_of(method, model, **options)
    steps = windows(size, parts) * EPOCHS
    schedule = get_scheduler("linear", optimizer, 0, len(steps))
    clip = (lambda: nn.utils.clip_grad_norm_(model.parameters(), limit)) if limit else None
    loss_of = lambda x, y: mse_loss(model(x), y)  # noqa: E731
    losses = train_by_hand(optimizer, steps, loss_of, clip=clip, after_step=schedule.step)
    return model, losses


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("method", list(METHODS))
def test_training_equals_that_by_hand(method: str, parts: int, tmp_path: Path) -> None:
    """Of the ten micro-batches of an epoch, the last is a step of its own."""
    trainer = trained(arguments(tmp_path, parts=parts), method)
    model, losses = expected_of(method, 4, parts)
    assert_same(trainer.model.net, model)
    assert trainer.model.evaluations == 10 * EPOCHS * METHODS[method].evaluations
    assert trainer.state.global_step == len(losses)
    found = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    rounding = 5e-5 if transformers.__version__.startswith("4.") else 0.0
    assert found == pytest.approx([loss.item() for loss in losses], rel=1e-6, abs=rounding)
    assert trainer.optimizer.optimizer.second_evaluation is None


def test_accumulation_equals_one_large_batch(tmp_path: Path) -> None:
    trainer = trained(arguments(tmp_path))
    large, _ = expected_of("wsam", 8, 1)
    for found, wanted in zip(trainer.model.parameters(), large.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-13)


def test_losses_divided_by_the_items_of_a_step(tmp_path: Path) -> None:
    """The number of items is that of all micro-batches, in the second evaluation too."""
    trainer = trained(arguments(tmp_path, parts=3), model=Summed())
    model, _ = expected_of("wsam", 4, 3)
    for found, wanted in zip(trainer.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-13)


def test_clipping_is_that_of_each_gradient(tmp_path: Path) -> None:
    trainer = trained(arguments(tmp_path, max_grad_norm=0.2))
    model, _ = expected_of("wsam", 4, 2, limit=0.2)
    assert_same(trainer.model.net, model)
    inside, _ = expected_of("wsam", 4, 2, max_grad_norm=0.2)
    free, _ = expected_of("wsam", 4, 2)
    for found, wanted, other in zip(
        trainer.model.parameters(), inside.parameters(), free.parameters(), strict=True
    ):
        # torch adds 1e-6 to the norm that it divides by.
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
        assert not torch.allclose(found, other, rtol=0, atol=1e-5)


def test_plain_steps_between(tmp_path: Path) -> None:
    trainer = trained(arguments(tmp_path), every=2)
    model, _ = expected_of("wsam", 4, 2, every=2)
    assert_same(trainer.model.net, model)
    assert trainer.model.evaluations == 10 * EPOCHS + 10


def test_a_checkpoint_goes_on_and_evaluation_does_not_disturb(tmp_path: Path) -> None:
    options = {"save_strategy": "epoch", "eval_strategy": "steps", "eval_steps": 2}
    trainer = trained(arguments(tmp_path, **options))
    model, _ = expected_of("wsam", 4, 2)
    assert_same(trainer.model.net, model)
    resumed = trained(arguments(tmp_path, **options), resume=str(tmp_path / "checkpoint-5"))
    assert_same(resumed.model.net, model)
    assert resumed.state.global_step == 10
    first, second = (t.optimizer.optimizer.state_dict()["state"] for t in (trainer, resumed))
    assert "exp_avg" in first[0]
    for entry, other in zip(first.values(), second.values(), strict=True):
        for key, value in entry.items():
            assert torch.equal(value, other[key]), key


class Leaves(TrainerCallback):
    """Ends the first training after a step and a half."""

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        control.should_training_stop = state.global_step == 1
        return control


def test_an_interrupted_window_does_not_reach_the_next_training(tmp_path: Path) -> None:
    trainer = trained(arguments(tmp_path), callbacks=[Leaves()])
    assert trainer.state.global_step == 1
    trainer.remove_callback(Leaves)
    trainer.model.net.load_state_dict(network().state_dict())
    trainer.optimizer = optimizer_of("wsam", trainer.model)
    trainer.train()
    assert_same(trainer.model.net, expected_of("wsam", 4, 2)[0])


def test_an_exception_restores_the_weights(tmp_path: Path) -> None:
    model = Regression()
    model.fails_at = 7  # in the second evaluation of the second step
    with pytest.raises(RuntimeError, match="no memory"):
        trained(arguments(tmp_path), model=model, restore="backup")
    expected = network()
    optimizer = optimizer_of("wsam", expected, restore="backup")
    train_by_hand(optimizer, windows(4, 2)[:1], lambda x, y: mse_loss(expected(x), y))
    assert_same(model.net, expected)


def tiny_bert() -> BertForSequenceClassification:
    torch.manual_seed(2)
    config = BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=16, num_labels=2,
    )  # fmt: skip
    return BertForSequenceClassification(config)


class Words(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(index)
        words = torch.randint(30, (8,), generator=generator)
        return {"input_ids": words, "labels": (words[0] > 15).long()}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_model_with_dropout(precision: str, tmp_path: Path) -> None:
    """The same random numbers are drawn as by hand: g1 of all micro-batches, then g2 of all."""
    args = arguments(tmp_path, bf16=precision == "bfloat16", num_train_epochs=1, data_seed=1)

    class Noted(InOrder):
        def training_step(self, model: Any, inputs: Any, *rest: Any, **kwargs: Any) -> Tensor:
            if not self.seen:
                torch.manual_seed(7)
            self.seen.append(copy.copy(inputs))
            return super().training_step(model, inputs, *rest, **kwargs)

    model = tiny_bert()
    trainer = Noted(
        model, args, train_dataset=Words(), optimizers=(optimizer_of("wsam", model), None)
    )
    trainer.seen = []
    trainer.train()
    expected = tiny_bert().train()
    optimizer = optimizer_of("wsam", expected)
    schedule = get_scheduler("linear", optimizer, 0, 4)

    def loss_of(batch: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            loss: Tensor = expected(**batch).loss
        return loss.float()

    steps = [[(batch,) for batch in trainer.seen[i : i + 2]] for i in (0, 2, 4, 6)]
    torch.manual_seed(7)
    # From version 5 on BERT takes keyword arguments, of which the Trainer concludes that its losses
    # are divided by the number of items. BERT does not divide, and so the losses add up.
    parts = 1 if trainer.model_accepts_loss_kwargs else None
    train_by_hand(optimizer, steps, loss_of, parts=parts, after_step=schedule.step)
    assert_same(model, expected)


class Mixed(SharpnessAwareTrainerMixin, Trainer):
    """Logs from the loss, as some trainers do."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        self.log({"seen": 1.0})
        return super().compute_loss(*args, **kwargs)


def test_the_mixin_makes_its_optimizer_and_logs_the_first_evaluation_only(tmp_path: Path) -> None:
    choice = (SAM, {"base_optimizer": torch.optim.AdamW, "lr": 0.01, "rho": 0.1})
    trainer = Mixed(
        tiny_bert(), arguments(tmp_path, num_train_epochs=1), train_dataset=Words(),
        optimizer_cls_and_kwargs=choice,
    )  # fmt: skip
    trainer.train()
    assert isinstance(trainer.optimizer.optimizer, SAM)
    assert [g["weight_decay"] for g in trainer.optimizer.param_groups] == [0.0, 0.0]
    assert sum("seen" in entry for entry in trainer.state.log_history) == 8


def test_what_cannot_work_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="the Trainer's optimizer is AdamW, expected an optimizer"):
        SharpnessAwareTrainer(Regression(), arguments(tmp_path), train_dataset=Data()).train()
    model = Regression()
    optimizer = ESAM(model.parameters(), torch.optim.SGD, lr=0.1)
    with pytest.raises(TypeError, match="is ESAM, which needs the loss of every sample"):
        InOrder(
            model, arguments(tmp_path), train_dataset=Data(), optimizers=(optimizer, None)
        ).train()


@pytest.mark.parametrize("limit", [0.0, 0.2])
@pytest.mark.parametrize("method", list(METHODS))
def test_scaled_losses(method: str, limit: float, tmp_path: Path) -> None:
    """Those of fp16=True, which the Trainer has on a GPU only; here in float64."""
    args = arguments(tmp_path, max_grad_norm=limit)
    model = Regression()
    trainer = InOrder(
        model, args, train_dataset=Data(), optimizers=(optimizer_of(method, model), None)
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    trainer.accelerator.scaler = scaler
    trainer.accelerator.native_amp = True
    trainer.accelerator.state._mixed_precision = "fp16"  # autocast leaves float64 alone
    trainer.train()
    expected, _ = expected_of(method, 4, 2, limit)
    pairs = zip(model.net.parameters(), expected.parameters(), strict=True)
    for param, wanted in pairs:
        torch.testing.assert_close(param, wanted, rtol=1e-12, atol=1e-13)
    assert scaler.get_scale() == 2.0**10


def test_without_the_mixin_a_step_is_an_error(tmp_path: Path) -> None:
    model = Regression()
    trainer = Trainer(
        model, arguments(tmp_path), train_dataset=Data(),
        optimizers=(optimizer_of("sam", model), None),
    )  # fmt: skip
    with pytest.raises(RuntimeError, match=r"docs/use_with\.md"):
        trainer.train()


def half(path: str) -> None:
    """Train in one of two processes; each takes every second batch."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # or Accelerate warns that it sets it
    torch.set_num_threads(1)
    trainer = trained(arguments(Path(path), size=2))
    if trainer.is_world_process_zero():
        torch.save(trainer.model.net.state_dict(), Path(path) / "weights")


@pytest.mark.skipif("fork" not in get_all_start_methods(), reason="processes cannot be forked")
def test_two_processes_equal_one(tmp_path: Path) -> None:
    debug_launcher(half, (str(tmp_path),), num_processes=2)
    found = torch.load(tmp_path / "weights")
    for name, wanted in expected_of("wsam", 4, 2)[0].state_dict().items():
        torch.testing.assert_close(found[name], wanted, rtol=1e-12, atol=1e-13)
