"""Compiles the Triton kernels for GPUs that need not be there; run as a script of its own.

Triton either interprets or compiles in one process, so the tests that want machine code start this
one: ``python compile_triton.py kernels 0 2`` compiles every second entry of :data:`ENTRIES`,
``python compile_triton.py launches`` counts how often whole steps compile. Both print JSON.
"""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from machine_code import spills_in_loops

from wsam_fused.base_rules import BaseRule
from wsam_fused.plan import Geometry, Point

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
PAIRS = [(F32, F32), (F32, BF16), (F32, F16), (BF16, BF16), (F16, F16), (F64, F64)]
# On the other architectures: the ends of the range, and what is used most.
FEW_PAIRS = [(F32, F32), (BF16, BF16), (F64, F64)]
ARCHITECTURES = (80, 90, 100)
CHUNK_SIZE = 65536  # of large lists
EUCLIDEAN, ADAPTIVE = Geometry.EUCLIDEAN, Geometry.ADAPTIVE


class Entry(NamedTuple):
    """One kernel: the arguments of its module's ``operands`` but the size of the chunks."""

    architecture: int
    module: str
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    @property
    def has_half_vectors(self) -> bool:
        """Whether all operands have 16 bits and there are registers for four of each only."""
        rule = self.arguments[2]
        states = len(rule.state_keys) if isinstance(rule, BaseRule) else 0
        return states > 1 and "state_dtype" in self.options and "has_master" not in self.options

    @property
    def name(self) -> str:
        parts = list(self.arguments)
        parts += [key for key, value in self.options.items() if value is True]
        parts += [v for v in self.options.values() if isinstance(v, (Point, torch.dtype))]
        words = [getattr(part, "name", str(part)).removeprefix("torch.").lower() for part in parts]
        return "-".join([f"sm_{self.architecture}", self.module, *words])


def _entries() -> Iterator[Entry]:
    own = {"has_master": False}
    for architecture in ARCHITECTURES:
        pairs = PAIRS if architecture == 90 else FEW_PAIRS
        for dtype, grad in pairs:
            low = dtype in (BF16, F16)  # always restored from a copy
            for pairing in range(4):  # three geometries, and the product with g1
                yield Entry(architecture, "reduce", (dtype, grad, pairing), {})
            for geometry in Geometry if architecture == 90 else (EUCLIDEAN, ADAPTIVE):
                for has_backup in {low or geometry != EUCLIDEAN, True}:
                    options = {"has_backup": has_backup, "target": Point.ASCENT, **own}
                    yield Entry(architecture, "perturb", (dtype, grad, geometry), options)
            yield Entry(
                architecture,
                "perturb",
                (dtype, dtype, EUCLIDEAN),
                {"has_backup": True, "target": Point.PROBE, **own},
            )
            for has_backup in {low, True}:
                options = {"has_backup": has_backup, "target": Point.WEIGHTS, **own}
                yield Entry(architecture, "perturb", (dtype, grad, EUCLIDEAN), options)
            rules = list(BaseRule) if architecture == 90 else [BaseRule.MOMENTUM, BaseRule.ADAM]
            for rule in rules:
                if rule == BaseRule.NONE and dtype != grad:
                    continue  # a foreign optimizer is given gradients of the parameters' dtype
                yield Entry(architecture, "update", (dtype, grad, rule, 2), {"has_backup": low})
            if low:
                yield from _kept_entries(architecture, dtype)
    for evaluations, has_backup in ((1, False), (2, True), (3, False), (3, True)):
        options = {"has_backup": has_backup}
        yield Entry(90, "update", (F32, F32, BaseRule.ADAM, evaluations), options)


def _kept_entries(architecture: int, dtype: torch.dtype) -> Iterator[Entry]:
    """Parameters of 16 bits with weights in float32, states of their own dtype, chance."""
    for target in (Point.ASCENT, Point.WEIGHTS) if architecture == 90 else (Point.ASCENT,):
        options = {"has_backup": True, "target": target, "has_master": True}
        yield Entry(architecture, "perturb", (dtype, dtype, EUCLIDEAN), options)
    narrow: dict[str, Any] = {"state_dtype": dtype}
    master: dict[str, Any] = {"has_master": True}
    chance: dict[str, Any] = {"by_chance": True, **narrow}
    kept = [(BaseRule.ADAM, {**master, **narrow})]
    if dtype == BF16:
        kept.append((BaseRule.ADAM, chance))
    if dtype == BF16 and architecture == 90:
        others = [master, narrow, {"by_chance": True}, {**master, "keep_point": True}]
        kept += [(BaseRule.ADAM, each) for each in others]
        kept += [(BaseRule.SGD, master), (BaseRule.AMSGRAD, {**master, **narrow})]
        kept += [(BaseRule.MOMENTUM, narrow)]
        kept += [(rule, chance) for rule in (BaseRule.MOMENTUM, BaseRule.AMSGRAD)]
    for rule, each in kept:
        options = {"has_backup": True, **each}
        yield Entry(architecture, "update", (dtype, dtype, rule, 2), options)


ENTRIES = list({entry.name: entry for entry in _entries()}.values())


def compiled(entry: Entry) -> dict[str, Any]:
    """Compile one kernel, and say what is in it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from wsam_fused.backends.triton import constants, perturb, reduce, update

    module = {"reduce": reduce, "perturb": perturb, "update": update}[entry.module]
    kernel = getattr(module, f"_{entry.module}_kernel")
    operands = module.operands(*entry.arguments, CHUNK_SIZE, **entry.options)
    dtype, grad_dtype, kind, *_ = entry.arguments
    programs = {
        reduce: lambda: reduce.programs_per_processor(grad_dtype, kind),
        perturb: lambda: perturb.PROGRAMS_PER_PROCESSOR,
        update: lambda: update.programs_per_processor(dtype, kind),
    }[module]()
    tables = {"table": "*i64", "first_tensor": "*i64", "steps": "*fp32"}
    doubles = dict.fromkeys(("groups", "scalars", "flags", "partials"), "*fp64")
    types = {**tables, **doubles, **dict.fromkeys(operands, "constexpr")}
    signature = {name: types.get(name, "i32") for name in kernel.arg_names}
    result = triton.compile(
        ASTSource(kernel, signature, operands),
        target=GPUTarget("cuda", entry.architecture, 32),
        options=constants.options(programs),
    )
    ptx = result.asm["ptx"]
    return {
        "triton": triton.__version__,
        "threads_per_processor": programs * constants.THREADS,
        "moves_between_threads": result.asm["ttgir"].count("convert_layout"),
        "loads": re.findall(r"ld\.global\S*\.v\d\.b\d+", ptx),
        "stores": re.findall(r"st\.global\S*\.v\d\.b\d+", ptx),
        "local_in_ptx": len(re.findall(r"\.local\b", ptx)),
        "inexact": re.findall(r"\b(?:div|sqrt|rsqrt|rcp)\.(?!rn)\S+|\S+\.ftz\S*", ptx),
        **_machine_code(Path(triton.__file__).parent, result.asm["cubin"]),
    }


def _machine_code(triton: Path, cubin: bytes) -> dict[str, Any]:
    tool = triton / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        return {}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        run = functools.partial(subprocess.run, capture_output=True, text=True, check=True)
        usage = run([tool, "-res-usage", file.name]).stdout
        code = run([tool, "-sass", file.name]).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    registers, stack = map(int, found.groups())
    return {"registers": registers, "stack": stack, "spills_in_loops": spills_in_loops(code)}


def launches() -> dict[str, int]:
    """Count the compiled variants of each kernel after steps that differ in every number."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import JITFunction, driver

    from wsam_fused import WSAM
    from wsam_fused.backends import BACKENDS
    from wsam_fused.backends.triton import TritonBackend, perturb, reduce, update

    class NoDevice:
        """Stands for the driver of an H100."""

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

    class CompilingBackend(TritonBackend):
        """Prepares launches as on a GPU, up to the machine code, and launches nothing."""

        DEVICE_TYPES = ("cpu",)

        def unavailable(self) -> str | None:
            return None

        def device_problem(self, device: torch.device) -> str | None:
            return None

        def on_device(self, device: torch.device) -> Any:
            return torch.no_grad()

        def programs(self, tensors: Any, per_processor: int) -> int:
            return per_processor

    run = JITFunction.run
    JITFunction.run = lambda self, *args, grid, warmup, **kw: run(  # type: ignore[method-assign]
        self, *args, grid=grid, warmup=True, **kw
    )
    driver.set_active(NoDevice())
    BACKENDS["triton-compiled"] = CompilingBackend()
    # One tensor and many: other numbers of tensors and chunks, another size of the chunks.
    for shapes in ([(1,)], [(5,), (40, 70), (0,)], [(3000, 2000), (7,)] + [(64,)] * 40):
        params = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
        optimizer = WSAM(params, torch.optim.AdamW, rho=0.1, backend="triton-compiled", lr=0.1)
        for lr, rho, decay, gamma in ((0.1, 0.05, 0.0, 0.9), (1.0, 1.0, 1.0, 0.5), (0, 0, 0, 0)):
            values = {"lr": lr, "rho": rho, "weight_decay": decay, "gamma": gamma}
            optimizer.param_groups[0].update(values)
            for param in params:
                param.grad = torch.randn_like(param)
            optimizer.first_step()
            for param in params:
                param.grad = torch.randn_like(param)
            optimizer.second_step()
    kernels = (reduce._reduce_kernel, perturb._perturb_kernel, update._update_kernel)
    return {kernel.__name__: len(kernel.device_caches[0][0]) for kernel in kernels}


if __name__ == "__main__":
    if sys.argv[1] == "kernels":
        first, stride = map(int, sys.argv[2:])
        results: Any = {entry.name: compiled(entry) for entry in ENTRIES[first::stride]}
    else:
        results = launches()
    print(json.dumps(results))
