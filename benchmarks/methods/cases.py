"""The methods, with the elements that a step of each moves.

Counted from the operations, per parameter; the pass of the base optimizer itself, B, comes on top.

=====================  ======  ==================================================================
operation              moved   what
=====================  ======  ==================================================================
reduce                 1       g1; 2 with the adaptive metric, which reads w
perturb                3       reads w, g1, writes p; 4 with a copy of w
reduce of g2 or g3     1       the same for each; 2 where g1 . g2 is wanted, which reads g1 as well
perturb, onwards       3       reads p, g1, writes p
update                 B + 1   g1 besides what the base reads: for w, for h, or both at once
=====================  ======  ==================================================================
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from wsam_fused import BSAM, ESAM, GNP, GSAM, RWSAM, SAM, WSAM

REFERENCE = "WSAM"
BETA = 0.5


@dataclass(frozen=True)
class Case:
    """One method with its options.

    Attributes:
        name: As in the tables.
        make: Takes parameters, a base optimizer's class and its arguments.
        extra: Elements moved per perturbed parameter besides those of the base optimizer's pass.
        microbatches: Number of closures of a step; 0 for one that is not a list.
        per_sample: Whether ``step`` takes losses of samples.
    """

    name: str
    make: Callable[..., Any]
    extra: float
    microbatches: int = 0
    per_sample: bool = False


_part = functools.partial

CASES = (
    Case("SAM", SAM, 5),
    # The copy of w takes the place of g1, which the update then does not read.
    Case("SAM, adaptive", _part(SAM, geometry="adaptive"), 6),
    Case("SAM, Fisher", _part(SAM, geometry="fisher"), 5),
    Case(REFERENCE, WSAM, 5),
    Case("WSAM, adaptive", _part(WSAM, geometry="adaptive"), 7),
    Case("WSAM, Fisher", _part(WSAM, geometry="fisher"), 6),
    Case("Coupled-WSAM", _part(WSAM, decouple=False), 5),
    Case("GNP", GNP, 5),
    Case("GSAM", GSAM, 7),
    # 1 + 3, norm of g2 1, to the descent point 3, norm of g3 1, update with g1 and g2 besides g3.
    Case("BSAM", BSAM, 11),
    Case("BSAM, as published", _part(BSAM, as_published=True), 11),
    # Of the tensors that are perturbed; the others have no g1, and only their base pass.
    Case("ESAM", _part(ESAM, beta=BETA), 5, per_sample=True),
    # To w + delta z with a copy 3, back 2; then SAM.
    Case("RWSAM", RWSAM, 10, per_sample=True),
    # Each micro-batch: 1 + 3, back 3; sum of g2: 2, then 3. At the end its norm 1.
    Case("SAM, 2 micro-batches", SAM, 20, microbatches=2),
    # Each micro-batch: 1 + 3, g2 2, one pass that adds h to the sum: 6, then 7. Its norm 1.
    Case("GSAM, 2 micro-batches", GSAM, 26, microbatches=2),
)
