"""Calls a kernel with tables that lead it astray: a sanitizer that looks on has to end the process.

    PYTHONPATH=. python tests/sanitizers/planted_fault.py FAULT [--emulated]

Without a sanitizer most of these go unnoticed. ``--emulated`` takes the CUDA kernels on the CPU.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from wsam_fused.plan import FLAGS, Geometry, GroupRow, Point, PointerTable, Slot, TableRow

FAULTS = ("none", "too-long", "misaligned", "far-away", "shared")
SIZE = 1024  # of each of two tensors, and of a chunk: each is one of its own
CPU = torch.device("cpu")


def tables(fault: str, params: list[torch.Tensor], grads: list[torch.Tensor]) -> PointerTable:
    """Return the table of two tensors, with the fault in it."""
    plan = PointerTable([SIZE] * 2, [0, 0], [0, 1], SIZE, CPU)
    plan.set_tensors(TableRow.PARAM, params)
    plan.set_tensors(TableRow.GRAD1, grads)
    if fault == "too-long":
        plan.table[TableRow.SIZE, 1] += 8
        plan.chunk_size *= 4
        plan.chunks = plan.chunks[:1]
    elif fault == "misaligned":
        plan.table[TableRow.PARAM, 1] += 1
        plan.table[TableRow.SIZE, 1] -= 1
    elif fault == "far-away":
        plan.table[TableRow.OFFSET, 0] = -(2**63)
    elif fault == "shared":
        plan.table[TableRow.PARAM, 1] = plan.table[TableRow.PARAM, 0]
    return plan


def perturb(operations: Any, plan: PointerTable) -> None:
    """Move the parameters to the ascent point."""
    groups = torch.zeros(1, len(GroupRow._fields), dtype=torch.float64)
    groups[0, GroupRow._fields.index("rho")] = 1.0
    scalars = torch.zeros(len(Slot), dtype=torch.float64)
    scalars[[Slot.METRIC_SQ, Slot.INV_SCALE1]] = 1.0
    flags = torch.zeros(FLAGS, dtype=torch.float64)
    dtype = torch.float32
    operations.perturb_.default(
        plan.table, plan.chunks, plan.chunk_size, dtype, dtype, groups, scalars, flags,
        Geometry.EUCLIDEAN, False, False, Point.ASCENT,
    )  # fmt: skip
    assert flags[0] == float(Point.ASCENT), "the kernel did nothing"


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("fault", choices=FAULTS)
    parser.add_argument("--emulated", action="store_true")
    options = parser.parse_args()
    operations = torch.ops.wsam_fused
    if options.emulated:
        sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
        import emulated

        reason = emulated.build()
        assert reason is None, reason
        operations = torch.ops.wsam_fused_emulated
    params, grads = ([torch.ones(SIZE) for _ in range(2)] for _ in range(2))
    perturb(operations, tables(options.fault, params, grads))
    print("nothing was noticed")


if __name__ == "__main__":
    main()
