"""Steps of every backend on random lists, with random gradients and options, beside the oracle."""

from __future__ import annotations

import pytest
from conftest import ON_CPU
from hypothesis import given, settings
from interpreted import interpreted_backend
from random_steps import backends_to_compare, cases, check, large, tiny

from wsam_fused.backends import BACKENDS

pytestmark = pytest.mark.filterwarnings("ignore:gradients are float16")
COMPARED = backends_to_compare(ON_CPU)
# The GPU's kernels run thread by thread here, or are interpreted.
EXAMPLES = {"cpu": 150, "cuda-emulated": 25}


@pytest.mark.parametrize("backend", COMPARED)
def test_random_lists_are_stepped_like_the_oracle(backend: str) -> None:
    @settings(max_examples=EXAMPLES[backend], deadline=None, derandomize=True)
    @given(case=cases())
    def run(case: object) -> None:
        check(case, backend)  # type: ignore[arg-type]

    run()


@pytest.mark.parametrize("lists", [large, tiny], ids=["large", "many-tiny"])
def test_long_lists_are_stepped_like_the_oracle(lists: object) -> None:
    if "cpu" not in COMPARED:
        pytest.skip("the extension is not built")

    @settings(max_examples=8, deadline=None, derandomize=True)
    @given(case=cases(lists))  # type: ignore[arg-type]
    def run(case: object) -> None:
        check(case, "cpu", steps=1)  # type: ignore[arg-type]

    run()


def test_random_lists_are_stepped_like_the_oracle_by_triton(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    backend = interpreted_backend()
    if backend.unavailable() is not None:
        pytest.skip(str(backend.unavailable()))
    monkeypatch.setitem(BACKENDS, "triton-interpreted", backend)

    @settings(max_examples=5, deadline=None, derandomize=True)
    @given(case=cases())
    def run(case: object) -> None:
        check(case, "triton-interpreted", steps=1)  # type: ignore[arg-type]

    run()
