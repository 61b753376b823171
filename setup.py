"""Builds the native extension; everything else about the package is in pyproject.toml.

The extension uses only torch's Stable ABI: one build serves every CPython from 3.10 and every
torch from 2.11 on.

Environment:
    WSAM_FUSED_NO_EXTENSION=1   install without it; the eager backend remains.
"""

import os
from pathlib import Path

from setuptools import Extension, setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

ROOT = Path(__file__).parent
TARGET_TORCH = "0x020b000000000000"  # 2.11


def cpu_extension() -> Extension:
    """Describe the extension: the operations and their CPU kernels."""
    sources = ["csrc/ops.cpp", "csrc/python/module.cpp"]
    sources += sorted(str(path) for path in Path("csrc/cpu").glob("*.cpp"))
    extension: Extension = CppExtension(  # type: ignore[no-untyped-call]
        name="wsam_fused._C",
        sources=sources,
        depends=[str(p) for p in Path("csrc").rglob("*.h")],
        py_limited_api=True,
        extra_compile_args={
            "cxx": [
                "-O3",
                "-std=c++17",
                "-fvisibility=hidden",
                # The kernels say themselves where products and sums are fused (csrc/math.h).
                "-ffp-contract=off",
                "-fno-math-errno",
                "-fno-trapping-math",
                f"-DTORCH_TARGET_VERSION={TARGET_TORCH}",
                "-DTORCH_STABLE_ONLY",
                "-DPy_LIMITED_API=0x030A0000",
            ]
        },
    )
    return extension


os.chdir(ROOT)
wanted = os.environ.get("WSAM_FUSED_NO_EXTENSION", "0") != "1"
setup(
    ext_modules=[cpu_extension()] if wanted else [],
    cmdclass={"build_ext": BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
