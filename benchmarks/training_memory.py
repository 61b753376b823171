"""The result file of the benchmark of training memory, and its Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.common import PROVENANCE, write_table
from benchmarks.contenders.libraries import OursInBackward
from benchmarks.report import table

# How far the peak of the update in the backward may be from plain AdamW's and the largest tensor.
SLACK = 0.03

FIELDS = (
    "net",
    "base",
    "contender",
    "dtype",
    "parameter_bytes",
    "largest_bytes",
    "peak_bytes",
    "plain_bytes",
    *PROVENANCE,
)
_EXPLANATION = """\
The worst moment of two training steps: parameters, states, gradients, activations. `peak`: in lists
of the parameters' size; `over plain`: what exceeds the peak of the plain base optimizer, in such
lists and in tensors of the size of the largest parameter. The update in the backward is meant to
need plain's peak and one such tensor, within {slack:.0%}. That holds where activations are few:
when its second backward begins, all of them and all first gradients are alive, while a plain
backward frees activations as it makes gradients. Where they are many, it needs up to one gradient
list more than plain; activation checkpointing makes them few."""


def render(rows: Sequence[Mapping[str, str]]) -> str:
    """Return the Markdown of the rows of a result file."""
    first = rows[0]
    caption = (
        f"On {first['device']}; torch {first['torch']}; commit {first['git']}, sources "
        f"{first['source']}; {first['date']}; `{first['command']}`."
    )
    parts = ["# Peak memory of a training step", caption, _EXPLANATION.format(slack=SLACK)]
    for net, base, dtype in dict.fromkeys((r["net"], r["base"], r["dtype"]) for r in rows):
        chosen = [r for r in rows if (r["net"], r["base"], r["dtype"]) == (net, base, dtype)]
        sizes = int(chosen[0]["parameter_bytes"]), int(chosen[0]["largest_bytes"])
        share = sizes[1] / sizes[0]
        title = f"## {net}; {base}, {dtype}"
        parts += [title, f"{sizes[0] / 1e6:.1f} MB of parameters, {share:.1%} in the largest one."]
        header = ("contender", "peak MB", "peak", "over plain", "in largest ones", "promise")
        parts.append(table(header, [_line(row) for row in chosen]))
    return "\n\n".join(parts) + "\n"


def over_plain(row: Mapping[str, str]) -> float:
    """Return what a row exceeds the plain base optimizer by, in bytes."""
    return float(row["peak_bytes"]) - float(row["plain_bytes"])


def _line(row: Mapping[str, str]) -> tuple[str, ...]:
    size, largest, peak = (
        float(row[name]) for name in ("parameter_bytes", "largest_bytes", "peak_bytes")
    )
    verdict = ""
    if row["contender"] == OursInBackward.name:
        ratio = peak / (float(row["plain_bytes"]) + largest)
        verdict = f"{ratio:.3f}: {'reached' if abs(ratio - 1) <= SLACK else 'NOT REACHED'}"
    over = over_plain(row)
    return (
        row["contender"],
        f"{peak / 1e6:.1f}",
        f"{peak / size:.2f}",
        f"{over / size:.2f}",
        f"{over / largest:.1f}",
        verdict,
    )


def write(path: Path, rows: Sequence[Mapping[str, object]]) -> str:
    """Write the result file and the Markdown beside it, and return the latter."""
    cells = write_table(path, FIELDS, rows)
    markdown = render(cells)
    path.with_suffix(".md").write_text(markdown)
    return markdown


_LABELS = {
    "authors": "the authors' formulation, eager",
    "wsam_fused": "ours",
    OursInBackward.name: "ours, `update_in_backward()`",
}


def summary(rows: Sequence[Mapping[str, str]]) -> str:
    """Return a shorter text: what WSAM needs beyond plain AdamW, in lists."""
    first = rows[0]
    chosen = [row for row in rows if (row["base"], row["dtype"]) == ("AdamW", "float32")]
    nets = list(dict.fromkeys(row["net"] for row in chosen))
    where = f"{first['device']}, torch {first['torch']}, float32, {first['date']}, `make bench`"
    title = (
        "Peak memory of whole training steps beyond that of plain `AdamW(fused=True)`, in lists of "
        f"the parameters' size ({where}):"
    )
    lines = []
    for contender, label in _LABELS.items():
        found = [row for row in chosen if row["contender"] == contender]
        lines.append(
            [label, *(f"{over_plain(r) / float(r['parameter_bytes']):.2f}" for r in found)]
        )
    plain = [row for row in chosen if row["contender"] == "plain"]
    shares = [float(r["largest_bytes"]) / float(r["parameter_bytes"]) for r in plain]
    lines.append(["*the largest parameter*", *(f"{share:.2f}" for share in shares)])
    peaks = [float(r["peak_bytes"]) / float(r["parameter_bytes"]) for r in plain]
    lines.append(["*the peak of plain AdamW*", *(f"{peak:.2f}" for peak in peaks)])
    return title + "\n\n" + table(["WSAM over AdamW", *nets], lines)
