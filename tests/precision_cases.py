"""Which backends step 16-bit parameters."""

from __future__ import annotations

import pytest
import torch

from wsam_fused.backends import BACKENDS

LOW = [torch.bfloat16, torch.float16]
NAMES = [
    name
    for name, backend in BACKENDS.items()
    if (not backend.DTYPES or torch.bfloat16 in backend.DTYPES) and backend.unavailable() is None
]
BACKEND = pytest.mark.parametrize("name", NAMES)
FUSED = pytest.mark.parametrize("name", [name for name in NAMES if name != "eager"])
DTYPE = pytest.mark.parametrize("dtype", LOW, ids=["bfloat16", "float16"])
