"""Methods beside each other: the table, the rows of the CSV file, and findings about pairs."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.demo_report import table
from benchmarks.paper.experiment import Finding
from benchmarks.paper.published import Number, printed
from benchmarks.paper.runs import Outcome, Spec
from benchmarks.paper.statistics import half_width, less, mean_and_deviation

Measure = Callable[[Outcome], float]
# By group (a data set, a level of noise, ...) and method.
Results = Mapping[tuple[str, str], Sequence[Outcome]]


def error(outcome: Outcome) -> float:
    """Return the top-1 error on the test set, in per cent."""
    return outcome.test_error


@dataclass(frozen=True)
class Claim:
    """A claim that one method has a lower error than another.

    Attributes:
        source: Paper and table.
        lower: Method with the lower one.
        higher: The other.
        numbers: What the paper found, in words.
    """

    source: str
    lower: str
    higher: str
    numbers: str


def claim(
    source: str, lower: str, higher: str, published: Mapping[str, Number], where: str
) -> Claim:
    """Return a claim with the paper's numbers.

    Args:
        source: Paper and table.
        lower: Method with the lower error.
        higher: The other.
        published: Errors by method.
        where: Model and data set of the paper.
    """
    numbers = f"{printed(published[lower])} against {printed(published[higher])} ({where})"
    return Claim(source, lower, higher, numbers)


def finding(found: Claim, group: str, results: Results, measure: Measure = error) -> Finding:
    """Return what the results of a group say about a claim."""
    lower, higher = (
        [measure(outcome) for outcome in results[group, method]]
        for method in (found.lower, found.higher)
    )
    claimed = f"error {found.lower} < {found.higher}: {found.numbers}"
    return lower_finding(found.source, claimed, group, lower, higher)


def lower_finding(
    source: str, claimed: str, group: str, lower: Sequence[float], higher: Sequence[float]
) -> Finding:
    """Return what values say about the claim that some are lower than others.

    Args:
        source: Paper and table.
        claimed: The claim, with the paper's numbers.
        group: What the values are of.
        lower: The values that the paper has lower, one for each seed.
        higher: The others.
    """
    verdict, interval = less(lower, higher)
    found = (
        f"{group}: {mean_and_deviation(lower)} against {mean_and_deviation(higher)}, "
        f"difference {interval}"
    )
    return Finding(source, claimed, found, verdict)


def errors(results: Results, group: str, methods: Iterable[str]) -> dict[str, list[float]]:
    """Return the errors of all seeds of some methods in a group."""
    return {method: [error(outcome) for outcome in results[group, method]] for method in methods}


def summary(values: Sequence[float]) -> dict[str, object]:
    """Return the columns of the CSV file that are the same for whatever was measured."""
    return {
        "mean": statistics.mean(values),
        "std": statistics.stdev(values),
        "half_width": half_width(values),
        "seeds": len(values),
    }


def results_table(
    results: Results, published: Mapping[tuple[str, str], str], measure: Measure = error
) -> str:
    """Return mean ± standard deviation, the interval of the mean, and the paper's number.

    Args:
        results: Of all runs.
        published: The paper's number in words, by group and method, where it has one.
        measure: What is compared.
    """
    rows = []
    for (group, method), outcomes in results.items():
        values = [measure(outcome) for outcome in outcomes]
        rows.append(
            (
                group,
                method,
                mean_and_deviation(values),
                f"± {half_width(values):.2f}",
                published.get((group, method), "-"),
                f"{statistics.mean(outcome.train_loss for outcome in outcomes):.4f}",
                f"{statistics.mean(outcome.seconds for outcome in outcomes):.1f}",
            )
        )
    headers = (
        "data",
        "method",
        "error, %",
        "95 % of the mean",
        "the paper's, %",
        "training loss",
        "s per run",
    )
    return table(headers, rows)


def hyper_table(specs: Mapping[tuple[str, str], Spec]) -> str:
    """Return the hyper-parameters of every method, the counterpart of the paper's tables."""
    rows = [
        (
            group,
            method,
            f"{spec.lr:g}",
            f"{spec.weight_decay:g}",
            ", ".join(f"{name} {value}" for name, value in spec.hyper) or "-",
            str(spec.epochs),
        )
        for (group, method), spec in specs.items()
    ]
    return table(("data", "method", "lr", "weight decay", "own", "epochs"), rows)


def rows(results: Results, specs: Mapping[tuple[str, str], Spec]) -> list[dict[str, object]]:
    """Return the rows of the CSV file: one for each group and method."""
    found = []
    for (group, method), outcomes in results.items():
        spec = specs[group, method]
        found.append(
            {
                "group": group,
                "method": method,
                "dataset": spec.dataset,
                "model": spec.model,
                "hyper": " ".join(f"{name}={value}" for name, value in spec.hyper),
                "lr": spec.lr,
                "weight_decay": spec.weight_decay,
                "epochs": spec.epochs,
                **summary([error(outcome) for outcome in outcomes]),
                "train_loss": statistics.mean(outcome.train_loss for outcome in outcomes),
                "seconds": statistics.mean(outcome.seconds for outcome in outcomes),
            }
        )
    return found
