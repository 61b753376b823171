"""Handwritten digits with Lightning: accumulated micro-batches, clipping and a schedule.

The callback evaluates all micro-batches of a step again at the perturbed weights, and keeps these
evaluations out of what is logged. Without accumulation training works without it.
"""
# Needs: lightning
# Reaches: accuracy 0.93

import logging

import torch
from digits import Digits, accuracy, network
from lightning.pytorch import LightningModule, Trainer
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from wsam_fused import WSAM
from wsam_fused.integrations.lightning import SharpnessAware

EPOCHS = 8


class Classifier(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = network()

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        x, y = batch
        loss = cross_entropy(self.model(x), y)
        self.log("loss", loss, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self) -> dict:
        optimizer = WSAM(self.parameters(), torch.optim.AdamW, rho=0.05, gamma=0.9, lr=5e-3)
        steps = self.trainer.estimated_stepping_batches
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=steps)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }


logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
torch.manual_seed(0)
digits = Digits()
loader = DataLoader(TensorDataset(digits.x, digits.y), batch_size=32, shuffle=True)
trainer = Trainer(
    accelerator="cpu",
    max_epochs=EPOCHS,
    callbacks=[SharpnessAware()],
    accumulate_grad_batches=2,
    gradient_clip_val=1.0,
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
module = Classifier()
trainer.fit(module, loader)

print(f"steps: {trainer.global_step}, loss: {trainer.callback_metrics['loss']:.4f}")
print(f"accuracy: {accuracy(module.model, digits):.3f}")
