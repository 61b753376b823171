"""16-bit parameters in the Triton kernels, interpreted: the checks of ``test_precision.py``.

With one or two rows of each of its matrices: the interpreter takes about a second for each.
"""

from __future__ import annotations

from typing import Any

import interpreted
import pytest
import test_kept_precision
import test_precision as precision
import torch
from cases import BASES, KEEPING, OPTIONS
from interpreted_steps import NAME, Values, check, few, unaligned, whole_chunks
from test_precision import DTYPE, KEPT, kept
from test_triton_interpreted import rounds_once

from wsam_fused import _extension
from wsam_fused.backends import BACKENDS

BACKEND = interpreted.interpreted_backend()
_REASON = BACKEND.unavailable()
BF16 = torch.bfloat16

pytestmark = pytest.mark.skipif(_REASON is not None, reason=str(_REASON))
needs_one_rounding = pytest.mark.skipif(
    not rounds_once(), reason="this interpreter rounds a multiply-add twice"
)


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, NAME, BACKEND)


@DTYPE
@KEPT
@pytest.mark.parametrize(("method", "base"), [("wsam", "amsgrad"), ("bsam-as-published", "sgdm")])
def test_equals_reference(method: str, base: str, keeping: str, dtype: torch.dtype) -> None:
    check(method, base, few, dtype, **OPTIONS["plain"], **kept(keeping, dtype))


@pytest.mark.parametrize("keeping", ["master", "master-narrow", "chance-narrow"])
@pytest.mark.parametrize(("option", "values"), [("asam", whole_chunks), ("fisher", unaligned)])
def test_equals_reference_with_options(option: str, values: Values, keeping: str) -> None:
    check("wsam", "adamw", values, BF16, **OPTIONS[option], **KEEPING[keeping])


@needs_one_rounding
@pytest.mark.skipif(_extension.UNAVAILABLE is not None, reason=str(_extension.UNAVAILABLE))
@DTYPE
@KEPT
def test_has_the_bits_of_the_cpu_kernels(keeping: str, dtype: torch.dtype) -> None:
    precision.compare_bits("cpu", NAME, "wsam", BASES["amsgrad"], dtype, **kept(keeping, dtype))


@pytest.mark.parametrize("keeping", ["chance", "chance-narrow"])
def test_chance_has_the_bits_of_the_reference(keeping: str) -> None:
    precision.test_chance_has_the_bits_of_the_reference(keeping, NAME)


@pytest.mark.parametrize("keeping", ["master", "chance-narrow"])
@pytest.mark.parametrize(
    "test", [precision.test_restore_is_exact, precision.test_a_skipped_step_changes_nothing]
)
def test_nothing_is_left_behind(test: Any, keeping: str) -> None:
    test(keeping, BF16, NAME)


def test_noise_goes_from_the_float32_weights() -> None:
    precision.test_noise_goes_from_the_float32_weights(BF16, NAME)


def test_what_others_write_to_a_parameter_is_followed() -> None:
    test_kept_precision.test_what_others_write_to_a_parameter_is_followed(BF16, NAME)
