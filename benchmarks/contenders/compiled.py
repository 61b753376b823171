"""torch.compile of the whole step, combine and base rule, written with foreach operations."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import ROOT
from benchmarks.contenders.contender import EPS, RHO, WEIGHT, Base, Contender


def perturb(params: list[Tensor], g1: list[Tensor]) -> Tensor:
    """Go to the ascent point and return the scale."""
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(g1)))
    scale: Tensor = RHO / (norm + EPS)
    torch._foreach_add_(params, torch._foreach_mul(g1, scale))
    return scale


def update(
    params: list[Tensor],
    g1: list[Tensor],
    g2: list[Tensor],
    states: list[list[Tensor]],
    step: Tensor,
    scale: Tensor,
    options: dict[str, Any],
) -> None:
    """Come back, step SGDM (one state) or AdamW (two), and subtract the decoupled term."""
    lr = options["lr"]
    decay = options["weight_decay"]
    torch._foreach_sub_(params, torch._foreach_mul(g1, scale))
    step.add_(1)
    if len(states) == 1:
        decayed = torch._foreach_add(g1, params, alpha=decay)
        torch._foreach_mul_(states[0], options["momentum"])
        torch._foreach_add_(states[0], decayed)
        torch._foreach_add_(params, states[0], alpha=-lr)
    else:
        beta1, beta2, eps = 0.9, 0.999, 1e-8
        exp_avgs, exp_avg_sqs = states
        torch._foreach_mul_(params, 1.0 - lr * decay)
        torch._foreach_lerp_(exp_avgs, g1, 1.0 - beta1)
        torch._foreach_mul_(exp_avg_sqs, beta2)
        torch._foreach_addcmul_(exp_avg_sqs, g1, g1, 1.0 - beta2)
        roots = torch._foreach_sqrt(exp_avg_sqs)
        torch._foreach_div_(roots, (1.0 - beta2**step).sqrt())
        torch._foreach_add_(roots, eps)
        steps = torch._foreach_div(exp_avgs, roots)
        torch._foreach_mul_(steps, lr / (1.0 - beta1**step))
        torch._foreach_sub_(params, steps)
    torch._foreach_add_(params, torch._foreach_sub(g2, g1), alpha=-lr * WEIGHT)


# One pair for all instances, so that a second instance does not compile again.
_perturb = torch.compile(perturb, fullgraph=True, dynamic=False)
_update = torch.compile(update, fullgraph=True, dynamic=False)


class ForeachCompiled(Contender):
    """Hand-written, compiled for exactly these shapes and hyper-parameters."""

    name = "foreach-compiled"
    temporary_lists = 2  # if the compiler does not fuse all it may

    def __init__(self, params: Sequence[Tensor], base: Base) -> None:
        super().__init__(params, base)
        self.optimizer = base.make(params, fused=True)  # holds the state and is not stepped
        # Where the parameters are: a kernel would wait for a scalar from elsewhere.
        self.step = torch.zeros((), device=self.params[0].device)
        self.scale = torch.zeros(())
        self.states: list[list[Tensor]] = []
        self.g1: list[Tensor] = []

    @classmethod
    def moved(cls, base: Base) -> int:
        """Elements read and written per parameter and step."""
        # If the compiler fuses all it may: norm 1, perturb 3; the update is the fused base's pass
        # and g2.
        return 5 + base.fused_moved

    @torch.no_grad()
    def first(self) -> None:
        """Go to the ascent point and take g1."""
        self.g1 = self.take_gradients()
        self.scale = _perturb(self.params, self.g1)

    @torch.no_grad()
    def second(self) -> None:
        """Come back and update."""
        if not self.states:
            self.states = self._find_states()
        g2 = self.take_gradients()
        _update(self.params, self.g1, g2, self.states, self.step, self.scale, self.base.options)
        self.g1 = []

    def _find_states(self) -> list[list[Tensor]]:
        assert self.optimizer is not None
        is_sgd = self.base.optimizer is torch.optim.SGD
        keys = ["momentum_buffer"] if is_sgd else ["exp_avg", "exp_avg_sq"]
        for param in self.params:
            state = self.optimizer.state[param]
            for key in keys:
                if state.get(key) is None:
                    state[key] = torch.zeros_like(param)
        return [[self.optimizer.state[param][key] for param in self.params] for key in keys]


def probe(
    shapes: str, base: str, limit_s: float, device: str = "cpu", dtype: str = "float32"
) -> tuple[float, str]:
    """Compile a case in a process of its own, which fills the compiler's cache on disk.

    Args:
        shapes: Name of the shape list.
        base: Name of the base optimizer.
        limit_s: The process is ended after that many seconds.
        device: Where the parameters are.
        dtype: Name of the parameters' dtype.

    Returns:
        Seconds of the first step, most of which is compilation, and an empty string; or NaN and
        why there is nothing to be measured.
    """
    command = [sys.executable, "-m", "benchmarks.contenders.compile_probe", shapes, base]
    command += [device, dtype]
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=output, stderr=errors, start_new_session=True
        )
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            return float("nan"), f"did not compile in {limit_s:g} s"
        finally:
            if process.poll() is None:  # timed out, or we are being interrupted
                os.killpg(process.pid, signal.SIGKILL)  # the compiler has children
                process.wait()
        output.seek(0)
        errors.seek(0)
        if code != 0:
            lines = errors.read().strip().splitlines() or [f"exit code {code}"]
            return float("nan"), f"could not compile: {lines[-1][:120]}"
        return float(json.loads(output.read().strip().splitlines()[-1])["seconds"]), ""
