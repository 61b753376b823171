"""Makes cases of hypothesis in batches: the process that fuzz.py starts.

``python _batches.py PART CASES SECONDS SEED FIRST`` prints a JSON object after each batch.
"""

from __future__ import annotations

import faulthandler
import json
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable

import hypothesis
import torch

BATCH = {"steps": 100, "calls": 20}
CALLS = 60  # in a sequence, at most
EVERY_BATCH = {
    "database": None,
    "deadline": None,
    "suppress_health_check": [*hypothesis.HealthCheck],
}


def steps(batch: int, seed: int) -> None:
    """Step random lists: most with the CPU's kernels, some with those of a GPU, some long ones."""
    import random_steps

    backend = "cuda-emulated" if batch % 5 == 4 else "cpu"
    lists = {7: random_steps.large, 8: random_steps.tiny}.get(batch % 10, random_steps.few)

    @hypothesis.seed(seed)
    @hypothesis.settings(max_examples=BATCH["steps"], **EVERY_BATCH)
    @hypothesis.given(case=random_steps.cases(lists))
    def run(case: random_steps.Case) -> None:
        random_steps.check(case, backend)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "gradients are float16")
        run()


def calls(batch: int, seed: int) -> None:
    """Make random sequences of public calls."""
    import random_calls

    random_calls.run(BATCH["calls"], CALLS, seed)


def counts_of(part: str) -> Counter[str]:
    """What the cases of a part count."""
    import random_calls
    import random_steps

    return random_steps.counts if part == "steps" else random_calls.RandomCalls.counts


def main(arguments: list[str]) -> None:
    """Make batches until there are enough cases or there is no time left."""
    part, cases, seconds, seed, first = arguments
    faulthandler.enable()
    torch.set_num_threads(1)
    import conftest  # the backends of the tests

    assert conftest.ON_CPU
    make: Callable[[int, int], None] = {"steps": steps, "calls": calls}[part]
    end = time.monotonic() + float(seconds)
    made, batch = 0, int(first)
    counts = counts_of(part)
    while made < int(cases) and time.monotonic() < end:
        counts.clear()
        failures = []
        try:
            make(batch, int(seed) * 1_000_000 + batch)
        except Exception as error:
            notes = "\n".join(getattr(error, "__notes__", []))
            failures.append(f"{part}, seed {seed}, batch {batch}: {error!r}\n{notes}")
        found = dict(counts)
        report = {"batch": batch, "cases": found.pop("cases"), "failures": failures}
        print(json.dumps({**report, "counts": found}), flush=True)
        made += report["cases"]
        batch += 1


if __name__ == "__main__":
    main(sys.argv[1:])
