"""A batch in parts that fit into memory: gradients are added up, and there is one perturbation.

The closure calls backward for each part, so that a step is that of the whole batch. A list of
closures would be something else (m-SAM): there every part has a perturbation of its own.
"""
# Reaches: accuracy 0.93

import torch
from digits import Digits, accuracy, network

from wsam_fused import WSAM

PARTS = 4

torch.manual_seed(0)
digits = Digits()
model = network()
optimizer = WSAM(
    model.parameters(), torch.optim.AdamW, rho=0.05, gamma=0.9, max_grad_norm=1.0, lr=5e-3
)

for x, y in digits.batches(epochs=8):

    def closure(x: torch.Tensor = x, y: torch.Tensor = y) -> torch.Tensor:
        optimizer.zero_grad()
        total = torch.zeros(())
        for part_x, part_y in zip(x.chunk(PARTS), y.chunk(PARTS), strict=True):
            # Summed over the part, divided by the size of the batch: parts may differ in size.
            loss = torch.nn.functional.cross_entropy(model(part_x), part_y, reduction="sum")
            loss = loss / len(x)
            loss.backward()
            total += loss.detach()
        return total

    optimizer.step(closure)

print(f"accuracy: {accuracy(model, digits):.3f}")
