"""The form of the field: two calls, with a backward before each.

``first_step`` moves to the worst-case neighbour and keeps the gradients, ``second_step`` comes back
and updates. A scheduler of torch sets the learning rate as for any optimizer.
"""
# Reaches: accuracy 0.93

import torch
from digits import Digits, accuracy, network

from wsam_fused import SAM

torch.manual_seed(0)
digits = Digits()
model = network()
criterion = torch.nn.functional.cross_entropy
optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.2, momentum=0.9)
schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=180)

for x, y in digits.batches(epochs=8):
    criterion(model(x), y).backward()
    optimizer.first_step(zero_grad=True)
    criterion(model(x), y).backward()
    optimizer.second_step(zero_grad=True)
    schedule.step()

print(f"accuracy: {accuracy(model, digits):.3f}")
