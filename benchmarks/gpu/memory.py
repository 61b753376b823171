"""Peak device memory of a step, as a training loop would see it."""

from __future__ import annotations

import gc

import torch
from torch import nn

from benchmarks.bench_memory import training_step
from benchmarks.contenders import GPU_CONTENDERS
from benchmarks.gpu.case import Case


def peak_bytes(case: Case, name: str, device: torch.device) -> int:
    """Return the most that two steps hold at one time besides the parameters.

    That is the state, both gradient lists while they are alive, what the contender keeps from step
    to step, and temporaries.
    """
    gc.collect()
    torch.cuda.empty_cache()
    values = (torch.full(s, 0.02, device=device, dtype=case.torch_dtype) for s in case.sizes)
    params = [nn.Parameter(tensor) for tensor in values]
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    one = GPU_CONTENDERS[name](params, case.base_optimizer)
    for _ in range(2):
        training_step(one, params)
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
