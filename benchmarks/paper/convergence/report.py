"""Tables, findings and curves of the convergence experiment."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from benchmarks.demo_report import table
from benchmarks.paper.convergence import convex, nonconvex
from benchmarks.paper.convergence.agreement import Agreement
from benchmarks.paper.convergence.outcomes import (
    ConvexOutcome,
    NonconvexOutcome,
    bound_verdict,
    rate_verdict,
)
from benchmarks.paper.convergence.picture import Curve
from benchmarks.paper.convergence.sgd_with_wsam import Setting
from benchmarks.paper.experiment import CANNOT_TELL, Finding
from benchmarks.paper.statistics import Interval, half_width

_CONVEX_SOURCE = "WSAM, Theorem 5.1, Corollary 5.2"
_NONCONVEX_SOURCE = "WSAM, Theorem 5.3, Corollary 5.4"
# Of the claim about sqrt(T): the others stand beside it.
_OWN_ALPHA = 1.0


def _label(setting: Setting) -> str:
    parts = [f"gamma {setting.gamma:g}"]
    parts += [f"batch {setting.batch}"] if setting.batch != 8 else []
    parts += [f"alpha {setting.alpha:g}"] if setting.alpha != _OWN_ALPHA else []
    parts += ["constant rho"] if setting.constant_rho else []
    return ", ".join(parts)


def _text(interval: Interval | None) -> str:
    return "none: not positive" if interval is None else str(interval)


def _reported(steps: Sequence[int]) -> list[int]:
    """Return the indices of T, T / 10, T / 100, ... as far as there are any, ascending."""
    wanted = [round(steps[-1] / 10**k) for k in range(10)]
    return [index for index, t in enumerate(steps) if t in wanted]


def _regret_table(outcomes: Sequence[ConvexOutcome]) -> str:
    steps = outcomes[0].steps
    at = _reported(steps)
    headers = (
        "setting",
        *(f"regret at T = {steps[i]}" for i in at),
        "regret / bound, at most",
        "exponent of T",
        "D_inf",
        "G_inf",
        "eta",
    )
    cells = []
    for outcome in outcomes:
        last = [run[-1] for run in outcome.runs]
        values = [outcome.regrets(i) for i in at]
        cells.append(
            (
                _label(outcome.setting),
                *(f"{statistics.mean(v):.1f} ± {half_width(v):.1f}" for v in values),
                f"{outcome.largest_ratio:.1e}",
                _text(outcome.exponent),
                f"{max(regret.distance for regret in last):.2f}",
                f"{max(regret.gradient for regret in last):.2f}",
                f"{max(regret.smoothness for regret in last):.1f}",
            )
        )
    return table(headers, cells)


def _gradient_table(outcomes: Sequence[NonconvexOutcome]) -> str:
    steps = outcomes[0].steps
    at = _reported(steps)
    headers = (
        "setting",
        *(f"least at T = {steps[i]}" for i in at),
        f"average at T = {steps[-1]}",
        "average / bound, at most",
        "exponent of log T / sqrt T",
        "G_inf",
        "eta",
        "curvature at the end",
    )
    cells = [
        (
            _label(outcome.setting),
            *(f"{outcome.found[i].least:.1e}" for i in at),
            f"{outcome.found[-1].average:.1e}",
            f"{outcome.largest_ratio:.1e}",
            _text(outcome.exponent),
            f"{outcome.found[-1].gradient:.2f}",
            f"{outcome.found[-1].smoothness:.2f}",
            f"{min(run.end_curvature for run in outcome.runs):.3f}",
        )
        for outcome in outcomes
    ]
    return table(headers, cells)


def text(
    convexes: Sequence[ConvexOutcome],
    nonconvexes: Sequence[NonconvexOutcome],
    compared: Agreement,
) -> str:
    """Return what was done, and the tables."""
    setting, seeds = convexes[0].setting, len(convexes[0].runs)
    problem = convex.PROBLEM
    return f"""
Algorithm 3 of the paper is WSAM over `torch.optim.SGD` with the learning rate alpha / sqrt(t) and
`rho=InverseSqrt({setting.rho:g})`. The loss is that of logistic regression on scikit-learn's breast
cancer data ({len(problem.samples)} samples, standardised, n = {problem.size} with the constant);
batches of {setting.batch}, drawn with replacement, {seeds} seeds, alpha = {setting.alpha:g} where
nothing else is said. ± and brackets: 95 % confidence (Student, over seeds).

**Convex.** Weights begin at zero and are projected onto [-{convex.BOX:g}, {convex.BOX:g}] after
every step. w* is the minimum in this box of the sum of the T batches really drawn, by L-BFGS-B, for
every T anew. D_inf and G_inf are the largest values up to T, eta the largest smoothness constant
of a batch, which has a closed form. The bound is that of Theorem 5.1 with the sum of rho_t as it
is; Corollary 5.2's is larger. *exponent*: slope of log regret over log T in the last decade.

{_regret_table(convexes)}

**Not convex.** The same loss and {nonconvex.PROBLEM.penalty:g} times the sum of w^2 / (1 + w^2), no
box; weights begin far out, where the penalty is concave. *least*: min over t <= T of the mean over
seeds of ||grad L(w_t)||^2. *average*: its mean over t, weighted with alpha_t, which is what the
proof bounds; it is larger. *exponent*: slope of log(least) over log(log T / sqrt T) in the last
decade, of each seed's own least; 1 is the rate of Corollary 5.4, more is faster. *curvature*: the
smallest Hessian eigenvalue after the last step, of all seeds.

{_gradient_table(nonconvexes)}

Fused and eager runs of seed 0 ({_label(convexes[2].setting)}, convex, {compared.steps} steps,
float64) differ by at most {compared.difference:.0e} in a weight; rounding may make that
up to {compared.tolerance:.0e}.
"""


def findings(
    convexes: Sequence[ConvexOutcome], nonconvexes: Sequence[NonconvexOutcome]
) -> list[Finding]:
    """Return the claims of the theorems beside what was found."""
    decreasing = [outcome for outcome in convexes if not outcome.setting.constant_rho]
    constant = [outcome for outcome in convexes if outcome.setting.constant_rho]
    own = [outcome for outcome in decreasing if outcome.setting.alpha == _OWN_ALPHA]
    slower = [outcome for outcome in decreasing if outcome.setting.alpha != _OWN_ALPHA]
    return [
        _regret_bound("regret <= C1 sqrt(T) + C2 sum of rho_t, rho_t = rho / sqrt(t)", decreasing),
        _regret_rate("regret is O(sqrt T): exponent of T at most 0.5", own),
        _regret_rate("the same, with a tenth of the learning rate", slower),
        _regret_bound("the same bound with constant rho, where it grows like T", constant),
        Finding(
            "WSAM, section 5.2",
            "rho is kept constant in practice; whether that converges is left open",
            "exponents of T with " + _exponents(constant),
            CANNOT_TELL,
        ),
        _gradient_bound(nonconvexes),
        _gradient_rate(nonconvexes),
    ]


def _exponents(outcomes: Sequence[ConvexOutcome] | Sequence[NonconvexOutcome]) -> str:
    return "; ".join(f"{_label(o.setting)}: {_text(o.exponent)}" for o in outcomes)


def _regret_bound(claim: str, outcomes: Sequence[ConvexOutcome]) -> Finding:
    ratios = [outcome.largest_ratio for outcome in outcomes]
    count = sum(len(run) for outcome in outcomes for run in outcome.runs)
    found = (
        f"at most {max(ratios):.1e} of the bound in {count} cases (settings, seeds, T): it is "
        f"at least {1.0 / max(ratios):,.0f} times too large"
    )
    return Finding(_CONVEX_SOURCE, claim, found, bound_verdict(ratios))


def _regret_rate(claim: str, outcomes: Sequence[ConvexOutcome]) -> Finding:
    intervals = [outcome.exponent for outcome in outcomes]
    agrees = [interval is not None and interval.high <= 0.5 for interval in intervals]
    holds = max(outcome.largest_ratio for outcome in outcomes) <= 1.0
    return Finding(_CONVEX_SOURCE, claim, _exponents(outcomes), rate_verdict(agrees, holds))


def _gradient_bound(outcomes: Sequence[NonconvexOutcome]) -> Finding:
    ratios = [outcome.largest_ratio for outcome in outcomes]
    count = sum(len(outcome.found) for outcome in outcomes)
    found = (
        f"the weighted average, above the minimum, is at most {max(ratios):.1e} of the bound in "
        f"{count} cases (settings, T): it is at least {1.0 / max(ratios):,.0f} times too large"
    )
    claim = "min over t of E||grad L(w_t)||^2 is below the bound"
    return Finding(_NONCONVEX_SOURCE, claim, found, bound_verdict(ratios))


def _gradient_rate(outcomes: Sequence[NonconvexOutcome]) -> Finding:
    intervals = [outcome.exponent for outcome in outcomes]
    agrees = [interval is not None and interval.low >= 1.0 for interval in intervals]
    holds = max(outcome.largest_ratio for outcome in outcomes) <= 1.0
    claim = "it is O(log T / sqrt T): exponent of that at least 1"
    return Finding(_NONCONVEX_SOURCE, claim, _exponents(outcomes), rate_verdict(agrees, holds))


def notes(convexes: Sequence[ConvexOutcome], nonconvexes: Sequence[NonconvexOutcome]) -> str:
    """Return what the reader should know of the theorems and of these figures."""
    # Seed and size of the batches decide what they are, on either problem; the penalty adds to it.
    size = nonconvexes[0].setting.batch
    alike = [outcome for outcome in convexes if outcome.setting.batch == size]
    smoothness = max(run[-1].smoothness for outcome in alike for run in outcome.runs)
    smoothness += 2.0 * nonconvex.PROBLEM.penalty
    return f"""
**The bounds are loose.** They take every coordinate of every gradient to be as large as the largest
one ever seen, and the sharpness term to work against descent at every step; with gamma = 0.9 the
squares enter with a factor of {convexes[2].setting.square_factor:.0f}. That a run stays below says
little, and the exponents say more. They are those of one decade, not of the limit: while the bound
holds, an exponent beyond the rate is no contradiction (the curve may rise faster until it comes
near), and the verdict is then that this size cannot tell.

**The statement of Theorem 5.1** lacks a factor alpha in the second term of C1, which its proof has
(the sum of alpha_t is below 2 alpha sqrt T). This report uses the proof's; the two are the same for
alpha = 1, and for smaller alpha the printed bound is larger and holds as well. **The proof of
Theorem 5.3** takes the expectation of the perturbed gradient as if the perturbation did not depend
on the batch. With the smoothness constant of the batches (here up to {smoothness:.0f}) in place of
that of L in C4 the step is right, and the bound larger still.

**Minima over t** of a mean over few seeds are biased downwards; the average is not.
"""


def rows(
    convexes: Sequence[ConvexOutcome], nonconvexes: Sequence[NonconvexOutcome]
) -> list[dict[str, object]]:
    """Return the rows of the CSV file: one for each setting, seed and T; means have no seed."""
    found: list[dict[str, object]] = []
    for outcome in convexes:
        for seed, run in enumerate(outcome.runs):
            found += [
                {
                    **_setting_cells("convex", outcome.setting),
                    "seed": seed,
                    "steps": regret.steps,
                    "quantity": "regret",
                    "value": regret.regret,
                    "bound": regret.bound,
                    "D_inf": regret.distance,
                    "G_inf": regret.gradient,
                    "eta": regret.smoothness,
                }
                for regret in run
            ]
    for nonconvex_outcome in nonconvexes:
        for at in nonconvex_outcome.found:
            found += [
                {
                    **_setting_cells("not convex", nonconvex_outcome.setting),
                    "seed": "",
                    "steps": at.steps,
                    "quantity": quantity,
                    "value": value,
                    "bound": at.bound,
                    "D_inf": "",
                    "G_inf": at.gradient,
                    "eta": at.smoothness,
                }
                for quantity, value in (("least", at.least), ("average", at.average))
            ]
    return found


def _setting_cells(problem: str, setting: Setting) -> dict[str, object]:
    return {
        "problem": problem,
        "gamma": setting.gamma,
        "batch": setting.batch,
        "alpha": setting.alpha,
        "rho": setting.rho,
        "radius": "constant" if setting.constant_rho else "rho / sqrt(t)",
    }


def curves_of_regrets(outcomes: Sequence[ConvexOutcome]) -> list[Curve]:
    """Return the mean regret, as a band the range of the seeds, and the mean bound."""
    curves = []
    for outcome in outcomes:
        at = range(len(outcome.steps))
        values = [outcome.regrets(i) for i in at]
        curves.append(
            Curve(
                _label(outcome.setting),
                outcome.steps,
                [min(v) for v in values],
                [statistics.mean(v) for v in values],
                [max(v) for v in values],
                [statistics.mean(run[i].bound for run in outcome.runs) for i in at],
            )
        )
    return curves


def curves_of_gradients(outcomes: Sequence[NonconvexOutcome]) -> list[Curve]:
    """Return the least mean squared norm, and as a band what is between it and the average."""
    return [
        Curve(
            _label(outcome.setting),
            outcome.steps,
            [at.least for at in outcome.found],
            [at.least for at in outcome.found],
            [at.average for at in outcome.found],
            [at.bound for at in outcome.found],
        )
        for outcome in outcomes
    ]
