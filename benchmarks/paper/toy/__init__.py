"""Which minimum of the toy loss SAM and WSAM end in: WSAM paper, section 4.2 and Figure 2."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.demo_report import table
from benchmarks.paper.experiment import AGREES, DISAGREES, Experiment, Finding, Options, Report
from benchmarks.paper.toy import loss as toy_loss
from benchmarks.paper.toy.paths import (
    CONTENDERS,
    LR,
    MOMENTUM,
    RHO,
    START,
    STEPS,
    Array,
    Contender,
    jittered_starts,
    path,
)
from benchmarks.paper.toy.picture import draw

_SOURCE = "WSAM, section 4.2, Figure 2"
# Beyond them two right computations may differ by more than rounding: the paths are chaotic.
_COMPARED_STEPS = 20
_DTYPES = {"float64": torch.float64, "float32": torch.float32}


@dataclass(frozen=True)
class _Outcome:
    """What one optimizer did.

    Attributes:
        contender: The optimizer.
        path: From the paper's start, in float64, shape [steps + 1, 2].
        basin: That it ends in.
        jittered: Number of jittered starts that end in each basin.
        others: Basins reached from the starts of further settings, by setting.
        fused_minus_eager: Largest difference over the first steps.
    """

    contender: Contender
    path: Array
    basin: str
    jittered: Mapping[str, int]
    others: Mapping[str, Mapping[str, int]]
    fused_minus_eager: float

    @property
    def end(self) -> tuple[float, float]:
        """The last point."""
        mu, sigma = self.path[-1].tolist()
        return mu, sigma

    @property
    def verdict(self) -> str:
        """Whether the paper's start ends in the paper's minimum."""
        return AGREES if self.basin == self.contender.claimed else DISAGREES


def _outcome(contender: Contender, options: Options, bar: tqdm) -> _Outcome:
    starts = options.of_size(quick=5, default=40, full=400)
    long = options.of_size(quick=300, default=2000, full=2000)
    # The paper's start, and in the full size jittered ones as well.
    further = [START, *jittered_starts(options.of_size(quick=0, default=0, full=40))]

    def count(starts: Sequence[tuple[float, float]], dtype: str, steps: int) -> dict[str, int]:
        found = dict.fromkeys((toy_loss.SHARP, toy_loss.FLAT, toy_loss.NEITHER), 0)
        for start in starts:
            found[_basin(path(contender, start, steps=steps, dtype=_DTYPES[dtype]))] += 1
            bar.update(steps)
        return found

    main = path(contender)
    eager = path(contender, steps=_COMPARED_STEPS, backend="eager")
    return _Outcome(
        contender,
        main,
        _basin(main),
        count(jittered_starts(starts), "float64", STEPS),
        {
            "float32": count(further, "float32", STEPS),
            f"{long} steps": count(further, "float64", long),
        },
        float(np.abs(main[: _COMPARED_STEPS + 1] - eager).max()),
    )


def _basin(path: Array) -> str:
    mu, sigma = path[-1].tolist()
    return toy_loss.basin(mu, sigma)


def _shares(counts: Mapping[str, int]) -> str:
    total = sum(counts.values())
    return ", ".join(f"{name} {count}/{total}" for name, count in counts.items() if count)


def _row(outcome: _Outcome) -> dict[str, object]:
    contender = outcome.contender
    mu, sigma = outcome.end
    return {
        "optimizer": contender.name,
        "algorithm": contender.algorithm,
        "gamma": contender.gamma,
        "rho": RHO,
        "lr": LR,
        "momentum": MOMENTUM,
        "steps": STEPS,
        "end_mu": mu,
        "end_sigma": sigma,
        "end_loss": float(toy_loss.loss(mu, sigma)),
        "minimum": outcome.basin,
        "minimum_in_the_paper": contender.claimed,
        **{f"jittered_{name}": count for name, count in outcome.jittered.items()},
        **{name.replace(" ", "_"): _shares(counts) for name, counts in outcome.others.items()},
        "fused_minus_eager": outcome.fused_minus_eager,
    }


def _results(outcomes: Sequence[_Outcome]) -> str:
    headers = (
        "optimizer",
        "algorithm",
        "end (mu, sigma)",
        "loss there",
        "minimum",
        "in the paper",
        "jittered starts",
        *outcomes[0].others,
        "fused - eager",
    )
    rows = [
        (
            outcome.contender.name,
            str(outcome.contender.algorithm),
            f"({outcome.end[0]:.2f}, {outcome.end[1]:.2f})",
            f"{toy_loss.loss(*outcome.end):.5f}",
            f"**{outcome.basin}**",
            outcome.contender.claimed,
            _shares(outcome.jittered),
            *map(_shares, outcome.others.values()),
            f"{outcome.fused_minus_eager:.0e}",
        )
        for outcome in outcomes
    ]
    return table(headers, rows)


def _minima_table() -> str:
    rows = [
        (
            minimum.name,
            f"({minimum.mu:.3f}, {minimum.sigma:.3f})",
            f"{minimum.loss:.5f}",
            ", ".join(f"{value:.1e}" for value in minimum.eigenvalues),
        )
        for minimum in toy_loss.minima().values()
    ]
    return table(("minimum", "(mu, sigma)", "loss", "Hessian eigenvalues"), rows)


def _text(outcomes: Sequence[_Outcome]) -> str:
    return f"""
The loss of two parameters, mean mu and standard deviation sigma of a normal distribution:
-log(0.7 exp(-K1 / 1.8^2) + 0.3 exp(-K2 / 1.2^2)), where K1 and K2 are the KL divergences of N(mu,
sigma) from N(20, 30) and N(-20, 10). It has two minima, found with scipy from the centres of the
two terms:

{_minima_table()}

The optimizers of this package over `torch.optim.SGD(momentum={MOMENTUM:g}, lr={LR:g})`,
rho = {RHO:g}, {STEPS} steps from {START} in float64; the number behind WSAM is gamma. *minimum* is
the one that L-BFGS-B goes to from the end of a path.

{_results(outcomes)}

*jittered starts*: drawn from a square of side 1 around the start of the paper. The two columns
after it: as on the left, but for what they say. *fused - eager*: the largest difference of the
coordinates over the first {_COMPARED_STEPS} steps; later the paths are chaotic, and only the
minimum can be compared.
"""


def _findings(outcomes: Sequence[_Outcome]) -> list[Finding]:
    sharp, flat = (toy_loss.minima()[name] for name in (toy_loss.SHARP, toy_loss.FLAT))
    values = [
        (sharp.mu, -16.8, 1),
        (sharp.sigma, 12.8, 1),
        (sharp.loss, 0.28, 2),
        (flat.mu, 19.8, 1),
        (flat.sigma, 29.9, 1),
        (flat.loss, 0.36, 2),
    ]
    same = all(round(found, digits) == claimed for found, claimed, digits in values)
    where = Finding(
        _SOURCE,
        "a sharp minimum at (-16.8, 12.8), loss 0.28, a flat one at (19.8, 29.9), loss 0.36",
        f"({sharp.mu:.3f}, {sharp.sigma:.3f}), loss {sharp.loss:.3f}; "
        f"({flat.mu:.3f}, {flat.sigma:.3f}), loss {flat.loss:.3f}",
        AGREES if same else DISAGREES,
    )
    ends = [
        Finding(
            _SOURCE,
            f"{_claimant(outcome.contender)} ends in the {outcome.contender.claimed} minimum",
            f"{outcome.contender.name} (Algorithm {outcome.contender.algorithm}) ends in the "
            f"{outcome.basin} one; jittered starts: {_shares(outcome.jittered)}",
            outcome.verdict,
        )
        for outcome in outcomes
    ]
    return [where, *ends]


def _claimant(contender: Contender) -> str:
    return "SAM" if contender.algorithm == 1 else f"WSAM with gamma = {contender.gamma:g}"


def _notes(outcomes: Sequence[_Outcome]) -> str:
    verdicts = {
        (outcome.contender.algorithm, outcome.contender.gamma): outcome.verdict
        for outcome in outcomes
    }
    if (verdicts[2, 0.95], verdicts[4, 0.95]) != (DISAGREES, AGREES):
        return ""
    gain = 1.0 / (1.0 - MOMENTUM)
    return f"""
The paper does not say which of its algorithms Figure 2 shows. WSAM is its Algorithm 2, the
decoupled one, and with gamma = 0.95 that ends in the sharp minimum here; Algorithm 4, which feeds
the sharpness into the momentum, does what the figure shows. A likely reason: the momentum
multiplies what stays the same from step to step by 1 / (1 - {MOMENTUM:g}) = {gain:.0f}. That is the
gradient of the loss and, if coupled, of the sharpness; the decoupled term enters as it is, and so
weighs less beside the loss than its gamma says.
"""


def run(options: Options) -> Report:
    """Run the five optimizers and report where they end."""
    with tqdm(desc="toy", unit="step", disable=None, leave=False) as bar:
        outcomes = [_outcome(contender, options, bar) for contender in CONTENDERS]
    return Report(
        text=_text(outcomes),
        rows=[_row(outcome) for outcome in outcomes],
        figure=draw({outcome.contender.name: outcome.path for outcome in outcomes}),
        caption="Paths of SAM and WSAM on the toy loss, and the loss along them",
        findings=_findings(outcomes),
        notes=_notes(outcomes),
    )


EXPERIMENT = Experiment(
    name="toy", title="Toy example: which minimum is reached", source=_SOURCE, run=run
)
