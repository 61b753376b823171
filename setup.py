"""Builds the native extension; everything else about the package is in pyproject.toml.

The extension uses only torch's Stable ABI: one build serves every CPython from 3.10 and every
torch from 2.11 on. The CUDA kernels are a library of their own, so that the CPU kernels load
where there is no CUDA; they are built wherever there is a compiler for them, with or without a GPU.

Environment:
    WSAM_FUSED_NO_EXTENSION=1   install without it; the eager and triton backends remain.
    WSAM_FUSED_CUDA=0           leave the CUDA kernels out; 1: fail if nvcc is missing.
    WSAM_FUSED_CUDA_ARCHS=9.0   instead of all of 8.0, 9.0, 10.0, 12.0 that nvcc knows; a list.
    CUDA_HOME                   where to look for nvcc, besides PATH and /usr/local/cuda.
    WSAM_FUSED_CXXFLAGS="-g"    flags after all others of the C++ compiler and linker; not of nvcc.
    MAX_JOBS                    compilers that run at once.
"""

import os
import re
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from torch.utils.cpp_extension import BuildExtension, CppExtension, include_paths, library_paths

ROOT = Path(__file__).resolve().parent
TARGET_TORCH = "0x020b000000000000"  # 2.11
STABLE_ABI = [f"-DTORCH_TARGET_VERSION={TARGET_TORCH}", "-DTORCH_STABLE_ONLY"]
# A wheel does not say where it was built: no debug information, and only the ends of the paths in
# the error messages of torch's headers.
# The last one that fits counts.
NO_PATHS = ["-g0", *(f"-ffile-prefix-map={path}=." for path in (ROOT, *include_paths()))]
# Of sanitizers and of coverage (.ci/sanitize, .ci/coverage).
EXTRA_FLAGS = shlex.split(os.environ.get("WSAM_FUSED_CXXFLAGS", ""))
CUDA_LIBRARY = "wsam_fused._cuda"
ARCHITECTURES = ("80", "90", "100", "120")


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
                *STABLE_ABI,
                # gcov has to find the sources.
                *([] if EXTRA_FLAGS else NO_PATHS),
                "-DPy_LIMITED_API=0x030A0000",
                *EXTRA_FLAGS,
            ]
        },
        extra_link_args=EXTRA_FLAGS,
    )
    return extension


def cuda_extension() -> Extension:
    """Name what the library of the CUDA kernels is made of; :class:`Build` compiles it."""
    sources = sorted(str(path) for path in Path("csrc/cuda").glob("*.cu"))
    headers = [p for ending in ("*.h", "*.cuh") for p in Path("csrc").rglob(ending)]
    return Extension(CUDA_LIBRARY, sources, depends=sorted(map(str, headers)), py_limited_api=True)


def find_nvcc() -> str | None:
    """Return the path of nvcc, or None where there is none or it is not wanted."""
    wanted = os.environ.get("WSAM_FUSED_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        raise ValueError(f"WSAM_FUSED_CUDA is {wanted!r}, expected auto, 0 or 1")
    if wanted == "0":
        return None
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    nvcc = shutil.which("nvcc", path=f"{home}/bin") or shutil.which("nvcc")
    if nvcc is None and wanted == "1":
        raise FileNotFoundError(f"WSAM_FUSED_CUDA is 1, but nvcc is not in {home}/bin or PATH")
    return nvcc


def architecture_flags(nvcc: str) -> list[str]:
    """Return machine code for every architecture, and code that newer ones compile themselves."""
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True)
    known = set(re.findall(r"compute_(\d+)\b", listed.stdout))
    asked = os.environ.get("WSAM_FUSED_CUDA_ARCHS")
    chosen = [arch for arch in ARCHITECTURES if arch in known]
    if asked:
        chosen = [arch.replace(".", "") for arch in re.split(r"[\s,;]+", asked.strip())]
    if not chosen or not known.issuperset(chosen):
        raise ValueError(
            f"WSAM_FUSED_CUDA_ARCHS is {asked!r}, expected some of {', '.join(sorted(known))}, "
            f"which are what {nvcc} knows"
        )
    # Others compile the code of the next older one: 11.0, say, that of 8.0.
    portable = {min(chosen, key=int), max(chosen, key=int)}
    return [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in chosen] + [
        f"-gencode=arch=compute_{arch},code=compute_{arch}" for arch in sorted(portable)
    ]


CUDA_FLAGS = [
    "-O3",
    "-std=c++17",
    # As for the CPU: fused only where csrc/math.h says so.
    "-fmad=false",
    "-Xcompiler=-fPIC,-fvisibility=hidden",
    "-DUSE_CUDA",
    *STABLE_ABI,
    *(f"-Xcompiler={flag}" for flag in NO_PATHS),
]


class Build(BuildExtension):
    """Compiles C++ as torch does, and CUDA by calling nvcc.

    torch's own way for CUDA needs a torch with CUDA; nvcc and torch's headers are enough.
    """

    extensions: list[Extension]

    def build_extensions(self) -> None:
        """Build all extensions; the CUDA kernels only if a source or a flag has changed."""
        every = self.extensions
        self.extensions = [one for one in every if one.name != CUDA_LIBRARY]
        super().build_extensions()
        self.extensions = every
        for extension in every:
            if extension.name == CUDA_LIBRARY:
                self._build_cuda(extension)
                return
        if self.inplace:
            # What an earlier build left would be loaded beside other operations than its own.
            for stale in ROOT.glob("wsam_fused/_cuda*.so"):
                stale.unlink()

    def _build_cuda(self, extension: Extension) -> None:
        nvcc = find_nvcc()
        assert nvcc is not None  # else there is no such extension
        target = Path(self.get_ext_fullpath(extension.name))
        folder = Path(self.build_temp) / "cuda"
        library = folder / target.name
        flags = [*CUDA_FLAGS, *architecture_flags(nvcc)]
        stamp = folder / "flags"
        sources = [*extension.sources, *extension.depends, str(ROOT / "setup.py")]
        newest = max(map(os.path.getmtime, sources))
        current = stamp.exists() and stamp.read_text() == " ".join(flags)
        if not (current and library.exists() and library.stat().st_mtime > newest):
            folder.mkdir(parents=True, exist_ok=True)
            self._compile_cuda(nvcc, flags, extension.sources, library)
            stamp.write_text(" ".join(flags))
        # The same library serves the tree and a wheel: compiling it takes minutes.
        target.parent.mkdir(parents=True, exist_ok=True)
        self.copy_file(str(library), str(target))

    def _compile_cuda(self, nvcc: str, flags: list[str], sources: list[str], library: Path) -> None:
        includes = [f"-I{path}" for path in include_paths()]
        objects = [str(library.parent / f"{Path(source).stem}.o") for source in sources]

        def compile_one(source: str, made: str) -> None:
            self._run([nvcc, *flags, *includes, "-c", source, "-o", made])

        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
            list(pool.map(compile_one, sources, objects))
        # CUDA's runtime is linked in: torch may bring another version. libtorch itself needs
        # whatever torch was built with, so that its CUDA functions are found at run time although
        # the torch of this build may not have them.
        libraries = [f"-L{path}" for path in library_paths()]
        libraries += ["-Xlinker=--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10"]
        # There is nothing to link on the device, and that step would note the paths.
        options = ["-shared", "-nodlink", "-cudart=static"]
        self._run([nvcc, *options, *objects, *libraries, "-o", str(library)])

    def _run(self, command: list[str]) -> None:
        self.announce(" ".join(command), level=2)
        if subprocess.run(command).returncode != 0:
            raise RuntimeError(
                f"{command[0]} could not compile the CUDA kernels, see above; set "
                "WSAM_FUSED_CUDA=0 to install without them, or CUDA_HOME to use another toolkit"
            )


os.chdir(ROOT)
extensions = []
if os.environ.get("WSAM_FUSED_NO_EXTENSION", "0") != "1":
    extensions.append(cpu_extension())
    if find_nvcc() is not None:
        extensions.append(cuda_extension())
setup(
    ext_modules=extensions,
    cmdclass={"build_ext": Build},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
