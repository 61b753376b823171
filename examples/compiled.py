"""A model under torch.compile: nothing changes for the optimizer.

Perturbed weights, steps and learning rates that change compile nothing again. With dropout,
`replay_rng=True` makes both evaluations with the same masks. On a machine without a C++ compiler,
Inductor is replaced by a backend that needs none.
"""
# Reaches: accuracy 0.93

import shutil

import torch
from digits import Digits, accuracy, network

from wsam_fused import WSAM

torch.manual_seed(0)
digits = Digits()
model = torch.nn.Sequential(torch.nn.Dropout(0.1), network())
compiled = torch.compile(model, backend="inductor" if shutil.which("g++") else "aot_eager")
optimizer = WSAM(
    model.parameters(), torch.optim.AdamW, rho=0.05, gamma=0.9, lr=5e-3, replay_rng=True
)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=8 * 23, eta_min=1e-3)

for x, y in digits.batches(epochs=8):

    def closure(x: torch.Tensor = x, y: torch.Tensor = y) -> torch.Tensor:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(compiled(x), y)
        loss.backward()
        return loss

    optimizer.step(closure)
    schedule.step()

print(f"accuracy: {accuracy(model.eval(), digits):.3f}")
