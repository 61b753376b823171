"""Collects how far apart computations were, for the table in ``docs/methods.md``.

``pytest --differences FILE`` (``make parity``) writes what was found, if all tests passed; without
the option nothing is collected.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wsam_fused import BSAM, WSAM

# None unless somebody wants them.
found: list[dict[str, Any]] | None = None


def note(kind: str, difference: float, *, of: tuple[str, str], backend: str, **more: Any) -> None:
    """Note a difference.

    Args:
        kind: ``"trajectory"`` or ``"step"``.
        difference: The largest absolute one of a test, or of a part of it.
        of: Method and geometry.
        backend: Whose result it is.
        more: ``dtype``, and for a trajectory ``peer`` and ``case``.
    """
    if found is not None:
        method, geometry = of
        entry = {"kind": kind, "method": method, "geometry": geometry, "backend": backend}
        found.append({**entry, **more, "difference": float(difference)})


def note_step(
    ours: Any, params: Sequence[Tensor], expected: Sequence[Tensor], form: str = ""
) -> None:
    """Note how far the parameters after a step are from those of the reference.

    Args:
        ours: The optimizer.
        params: Its parameters.
        expected: What they should be.
        form: Of the step, added to the method's name.
    """
    if found is None:
        return
    gaps = [
        (p.detach().cpu().double() - q.detach().cpu().double()).abs().max().item()
        for p, q in zip(params, expected, strict=True)
        if p.numel()
    ]
    dtypes = {param.dtype for param in params}
    if gaps and len(dtypes) == 1:
        dtype = str(dtypes.pop()).removeprefix("torch.")
        name, geometry = label(ours)
        of = (name + form, geometry)
        note("step", max(gaps), of=of, backend=ours._backend, dtype=dtype)


def label(optimizer: Any) -> tuple[str, str]:
    """Name an optimizer's method and geometry as the table does."""
    name = type(optimizer).__name__
    if isinstance(optimizer, WSAM) and not optimizer.decouple:
        name = "Coupled-WSAM"
    if isinstance(optimizer, BSAM) and optimizer.as_published:
        name = "BSAM, as published"
    return name, optimizer.own(optimizer.param_groups[0], "geometry")


def write(path: Path) -> None:
    """Write the largest difference of each kind of thing, with the number of cases."""
    assert found is not None
    merged: dict[tuple[Any, ...], dict[str, Any]] = {}
    cases: dict[tuple[Any, ...], set[str]] = {}
    for entry in found:
        key = tuple(v for k, v in entry.items() if k not in ("difference", "case"))
        cases.setdefault(key, set()).add(entry.get("case", ""))
        if key not in merged or entry["difference"] > merged[key]["difference"]:
            merged[key] = entry
    rows = [{**entry, "cases": len(cases[key])} for key, entry in merged.items()]
    for row in rows:
        row.pop("case", None)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=1) + "\n")
