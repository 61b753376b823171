"""A model in bfloat16: weights kept in float32 by the optimizer, or rounded by chance.

``master_weights=True`` costs 4 bytes per parameter and loses nothing; with
``stochastic_rounding=True`` and ``state_dtype="parameter"`` everything has 16 bits.
"""
# Reaches: accuracy 0.93

import torch
from digits import Digits, accuracy, network

from wsam_fused import WSAM

digits = Digits()
digits.x, digits.test_x = digits.x.bfloat16(), digits.test_x.bfloat16()


def trained(**options: bool | str) -> float:
    torch.manual_seed(0)
    model = network().bfloat16()
    optimizer = WSAM(model.parameters(), torch.optim.AdamW, rho=0.05, lr=5e-3, **options)
    for x, y in digits.batches(epochs=8):

        def closure(x: torch.Tensor = x, y: torch.Tensor = y) -> torch.Tensor:
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(x).float(), y)
            loss.backward()
            return loss

        optimizer.step(closure)
    return accuracy(model, digits)


kept_in_float32 = trained(master_weights=True)
rounded_by_chance = trained(stochastic_rounding=True, state_dtype="parameter")
print(f"master_weights: {kept_in_float32:.3f}, stochastic_rounding: {rounded_by_chance:.3f}")
print(f"accuracy: {min(kept_in_float32, rounded_by_chance):.3f}")
