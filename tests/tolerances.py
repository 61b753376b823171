"""How far two correct computations may be apart, and why.

``u`` is the unit roundoff: 6e-8 in float32, 1.1e-16 in float64.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Tolerance(NamedTuple):
    rtol: float
    atol: float


# One step of a backend against the reference, which computes in float64 and rounds once. Relative:
# about 10 roundings. Absolute, where terms cancel: the sum -3 g1 + 4 g2 (gamma = 0.8, coupled) of
# normal gradients, |g| < 5, has terms of 35 in all, and each of its two roundings may be u of that:
# 70 u = 4e-6. The decoupled sum has weights of 18, but enters multiplied by lr <= 0.1. The float64
# figures are the same with its u, and the reference's own roundings on top.
ONE_STEP = {
    torch.float32: Tolerance(rtol=1e-6, atol=4e-6),
    torch.float64: Tolerance(rtol=1e-14, atol=1.5e-14),
}

# Parameters of low precision are computed in float32 and rounded once, by the reference in float64:
# two values that are close together round to the same number or to neighbours, which are eps apart
# relative to the value. Their states are float32 and have its tolerance.
ONE_STEP[torch.bfloat16] = Tolerance(rtol=2**-7, atol=4e-6)
ONE_STEP[torch.float16] = Tolerance(rtol=2**-10, atol=4e-6)

# A sum of squares is accumulated in float64 by every backend: n u of float64.
REDUCTION = {torch.float32: Tolerance(1e-12, 0.0), torch.float64: Tolerance(1e-12, 0.0)}

# p = fma(s, M g, w): s, M g and the sum are rounded, |e| < 1 where p may cancel: 3 u of e, 1 u of
# p. In float64 the expected value of the test is rounded as often.
PERTURBED = {
    torch.float32: Tolerance(rtol=1.2e-7, atol=2e-7),
    torch.float64: Tolerance(rtol=5e-16, atol=1e-15),
    # Neighbours, as above.
    torch.bfloat16: Tolerance(rtol=2**-7, atol=2e-7),
    torch.float16: Tolerance(rtol=2**-10, atol=2e-7),
}

# A few float64 steps in several processes against the same in one: means over ranks are summed up
# in another order, which changes gradients of the size of 1 by some u. RWSAM divides differences of
# losses by delta = 1e-3, which makes that 1e3 u = 1e-13 of what it weighs (found: 7e-15), the
# others do not (found: 4e-16).
REPLICAS = Tolerance(rtol=1e-13, atol=2e-14)
# Four steps in float64 in which the mean gradient of a batch, and norms, are summed in another
# order (over ranks, over parts): 16 samples, 100 parameters, so 1e-14 of the largest gradient of a
# step; the weights and moments of later steps carry it on, with factors up to 10 (WSAM's weight of
# g2 - g1, Adam's quotient of small moments).
TRAJECTORY = Tolerance(rtol=1e-12, atol=1e-13)

# A figure of the landscape of 45 parameters against its closed form in float64. Sums of 45 terms:
# 45 u of their absolute values, which are up to 10 times the figure where they cancel: 450 u = 3e-5
# and 5e-14, relative. The rise of a loss is the difference of two, of the size of 10 at most, each
# off by 45 u of that: 900 u = 6e-5 and 1e-13.
LANDSCAPE = {
    torch.float32: Tolerance(rtol=3e-5, atol=6e-5),
    torch.float64: Tolerance(rtol=5e-14, atol=1e-13),
}


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: Tolerance, what: str) -> None:
    """Assert closeness, saying what differs."""
    torch.testing.assert_close(
        actual,
        expected,
        rtol=tolerance.rtol,
        atol=tolerance.atol,
        msg=lambda message: f"{what}: {message}",
    )
