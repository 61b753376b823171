"""Render the GPU report's JSON as Markdown.

    python -m benchmarks.gpu_table FILE.json [...]               print
    python -m benchmarks.gpu_table --update FILE.json [...]      also take in the stages' results
                                                                 beside it, and write FILE.md

Every number comes from the file.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu import stages
from benchmarks.gpu.record import with_checks, write_json
from benchmarks.report import table

NOT_MEASURED = "not measured"

Cells = Mapping[str, Any]

_CONTENDERS = """\
`cuda`, `triton`: wsam_fused with that backend. `authors`: the authors' formulation, with the base
optimizer's default implementation. `foreach`: hand-written with multi-tensor operations and
`fused=True`, without waiting for the device. `foreach-compiled`: the whole step written with
`torch._foreach` under `torch.compile`. `plain`: the base optimizer alone, `fused=True`, one
gradient; no SAM at all. `wsam_fused`: the best backend of a machine without a GPU."""
_EXPLANATION = """\
Gradients are given, no model runs, setting `.grad` is not timed. `device`: CUDA events around both
halves of a step, which come behind copies that evict the caches and keep the device busy while the
host prepares, as a backward pass does; median over interleaved rounds, 20th to 80th percentile.
`host`: until both calls returned, nothing queued before. `wall`: likewise until the device was
done. `B / param`: bytes read and written per parameter, counted from the operations and the dtypes
below; GB/s follow from it and from `device`. `of copy`: those GB/s over the GB/s of a
device-to-device copy just before, in the same rounds. `launches`: kernels, and besides them copies
and fills of memory. `peak`: device memory of a step beside the parameters (states, both gradients,
scratch); `extra`: above that of `plain`, in copies of the parameters."""
_DTYPES = """\
Parameters and gradients have the dtype of the title, the base optimizer's state that of the column
`state`. With bfloat16 torch's fused optimizers keep states of bfloat16, and the temporaries of all
that is made of torch's operations are bfloat16; wsam_fused computes in float32, rounds a parameter
once per half step and keeps a copy of w within the step, so that the bytes differ."""
_HEADER = (
    "contender",
    "device ms",
    "p20 to p80",
    "time / ours",
    "time / plain",
    "GB/s",
    "of copy",
    "B / param",
    "state",
    "host ms",
    "wall ms",
    "launches",
    "peak GiB",
    "extra",
    "compile s",
)


def read(path: Path) -> dict[str, Any]:
    """Return the report in a file."""
    report: dict[str, Any] = json.loads(path.read_text())
    return report


def render(report: Cells) -> str:
    """Return the Markdown of a report."""
    parts = [f"# WSAM on {report['device']}", _caption(report)]
    if report["timer"] != "CUDA events":
        parts.append(
            "**A dry run without a GPU, timed by the wall clock: its numbers mean nothing.**"
        )
    parts += [_stages(report["stages"]), "## What is wanted", _checks(report["checks"])]
    parts += ["## What was measured", _CONTENDERS, _EXPLANATION, _DTYPES]
    for case in dict.fromkeys(map(_case, report["rows"])):
        rows = [row for row in report["rows"] if _case(row) == case]
        parts += [_case_title(rows), _case_table(rows)]
    parts += ["## Operations of a step", _operations(report["operations"])]
    parts += ["## Captured in CUDA graphs", _captured(report["captured"])]
    if report["problems"]:
        parts += ["## What went wrong", "\n".join(f"* {text}" for text in report["problems"])]
    return "\n\n".join(parts) + "\n"


def _case(row: Cells) -> tuple[str, str, str]:
    return row["shapes"], row["base"], row["dtype"]


def _caption(report: Cells) -> str:
    device = report["device"]
    if "capability" in report:
        device += (
            f" (compute capability {report['capability']}, {report['multiprocessors']} "
            f"multiprocessors, {report['memory_gib']:.0f} GiB, L2 {report['l2_mib']:.0f} MiB)"
        )
    copy = report["copy_gb_per_s"]
    return (
        f"WSAM, decoupled; {device}; driver {report['driver']}, torch {report['torch']} (CUDA "
        f"{report['cuda']}), triton {report['triton']}, nvcc {report['nvcc']}, Python "
        f"{report['python']}; commit {report['git']}, sources {report['source']}; "
        f"{report['date']}; `{report['command']}`.\n\n"
        f"Device-to-device copy, {report['copy_bytes'] / 2**30:.3g} GiB read and written: "
        f"{copy['median']:.1f} GB/s ({copy['p20']:.1f} to {copy['p80']:.1f})."
    )


def _stages(results: Cells) -> str:
    lines = []
    for stage in stages.STAGES:
        result = results.get(stage)
        if result is None:
            lines.append([stage, "not run", "", ""])
            continue
        ended = "ended well" if result["exit"] == 0 else f"FAILED (exit code {result['exit']})"
        lines.append([stage, ended, f"{result['seconds']:.0f}", _stage_detail(stage, result)])
    return table(("stage", "outcome", "seconds", "detail"), lines)


def _stage_detail(stage: str, result: Cells) -> str:
    if stage == "build" and result["built_s"] is not None:
        return f"{result['built_s']:.0f} s from a clean tree"
    if stage == "tests" and result["failures"] is not None:
        text = "{passed} passed, {failures} failed, {skipped} skipped".format_map(result)
        missing = result["files_not_collected"]
        return text + (f"; {missing} files need what is not installed" if missing else "")
    if stage == "sanitize":
        return "; ".join(map(_sanitizer_run, result["runs"]))
    return ""


def _sanitizer_run(run: Cells) -> str:
    errors = "no summary" if run["errors"] is None else f"{run['errors']} errors"
    steps = "not all steps compared" if run["steps"] is None else f"{run['steps']} steps"
    return f"{run['name']}: {errors}, {steps}, exit code {run['exit']}"


def _checks(checks: Sequence[Cells]) -> str:
    header = ("where", "wanted", "measured", "")
    keys = ("shapes", "wanted", "measured", "verdict")
    return table(header, [[check[key] for key in keys] for check in checks])


def _case_title(rows: Sequence[Cells]) -> str:
    first = rows[0]
    title = "### " + ", ".join(_case(first))
    title += f"\n\n{first['tensors']} tensors, {first['parameters']:,} parameters"
    copies = [row["copy_gb_per_s"] for row in rows if row.get("copy_gb_per_s")]
    rounds = [row["rounds"] for row in rows if row.get("rounds")]
    if copies:
        title += f"; copies at {min(copies):.0f} to {max(copies):.0f} GB/s; {max(rounds)} rounds"
    return title + "."


def _case_table(rows: Sequence[Cells]) -> str:
    lines = []
    for row in sorted(rows, key=lambda row: row.get("device_ms") or float("inf"), reverse=True):
        if row["note"]:
            note = f"{NOT_MEASURED}: {row['note']}"
            lines.append([row["contender"], note, *[""] * (len(_HEADER) - 2)])
        else:
            lines.append(_cells(row))
    return table(_HEADER, lines)


def _cells(row: Cells) -> list[str]:
    compiled = row["contender"] == "foreach-compiled"
    return [
        row["contender"],
        _number(row, "device_ms", "{:.4g}"),
        f"{row['device_p20_ms']:.4g} to {row['device_p80_ms']:.4g}",
        _number(row, "ratio_to_ours", "{:.2f}"),
        _number(row, "ratio_to_plain", "{:.2f}"),
        _number(row, "gb_per_s", "{:.1f}"),
        _number(row, "share_of_copy", "{:.1%}"),
        _number(row, "bytes_per_parameter", "{}"),
        row["state_dtype"],
        _number(row, "host_ms", "{:.3g}"),
        _number(row, "wall_ms", "{:.3g}"),
        _launches(row),
        _number(row, "peak_gib", "{:.3g}"),
        _number(row, "peak_extra_copies", "{:.2f}"),
        _number(row, "compile_s", "{:.1f}") if compiled else "",
    ]


def _number(row: Cells, key: str, shown: str) -> str:
    return NOT_MEASURED if row.get(key) is None else shown.format(row[key])


def _launches(row: Cells) -> str:
    if row.get("launches") is None:
        return NOT_MEASURED
    return f"{row['launches']}, {row['memory_copies']} copies, {row['memory_fills']} fills"


def _operations(rows: Iterable[Cells]) -> str:
    header = ("case", "backend", "operation", "us", "kernels", "B / param", "GB/s", "of copy")
    lines = [
        [
            ", ".join(_case(row)),
            row["backend"],
            row["operation"],
            f"{row['microseconds']:.4g}",
            str(row["launches"]),
            str(row["bytes_per_parameter"]),
            f"{row['gb_per_s']:.1f}",
            f"{row['share_of_copy']:.1%}",
        ]
        for row in rows
    ]
    if not lines:
        return f"{NOT_MEASURED.capitalize()}."
    return "Kernel times from the profiler, behind copies that evict the caches.\n\n" + table(
        header, lines
    )


def _captured(rows: Sequence[Cells]) -> str:
    header = ("case", "device ms", "p20 to p80", "host ms", "p20 to p80")
    lines = []
    for row in rows:
        case = ", ".join(_case(row))
        if row["note"]:
            lines.append([case, f"{NOT_MEASURED}: {row['note']}", "", "", ""])
            continue
        cells = [case]
        for kind in ("device", "host"):
            cells.append(f"{row[f'{kind}_median_ms']:.4g}")
            cells.append(f"{row[f'{kind}_p20_ms']:.4g} to {row[f'{kind}_p80_ms']:.4g}")
        lines.append(cells)
    if not lines:
        return f"{NOT_MEASURED.capitalize()}."
    intro = (
        "`cuda`, both halves replayed with gradients that stay in place; compared before with "
        "steps that are not captured, bit for bit."
    )
    return f"{intro}\n\n{table(header, lines)}"


def update(path: Path) -> None:
    """Take the stages' results beside a report into it, if they are of the same sources."""
    report = read(path)
    found = stages.read(path.parent, report)
    report = with_checks({**report, "stages": {**report["stages"], **found}})
    write_json(path, report)
    path.with_suffix(".md").write_text(render(report))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE.json")
    parser.add_argument("--update", action="store_true", help="take in the stages, write FILE.md")
    options = parser.parse_args(arguments)
    for path in options.files:
        if options.update:
            update(path)
        print(render(read(path)))


if __name__ == "__main__":
    main()
