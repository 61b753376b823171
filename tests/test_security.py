"""What the package does not do: run text or pickles, start processes, open connections.

Read off the syntax tree, so that nobody adds it unnoticed. See SECURITY.md.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import wsam_fused

PACKAGE = Path(wsam_fused.__file__).parent
ROOT = PACKAGE.parent
SOURCES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))

# Called by their bare names.
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "input", "breakpoint", "open"}
# The beginning of the names of modules, and of what is called through modules.
FORBIDDEN_NAMES = (
    *("pickle", "cPickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"),
    *("subprocess", "pty", "multiprocessing", "ctypes", "cffi"),
    *("socket", "ssl", "http", "urllib", "requests", "ftplib", "smtplib", "xmlrpc", "asyncio"),
    *("tempfile", "shutil", "runpy", "code", "codeop"),
    *("os.system", "os.popen", "os.exec", "os.spawn", "os.fork", "os.remove", "os.unlink"),
    *("torch.load", "torch.save", "torch.hub", "torch.utils.cpp_extension", "torch.jit.load"),
    *("torch.serialization", "torch.package", "numpy.load"),
)
# Modules by computed names: Triton, whose absence is a reason and no error, and its kernels.
ALLOWED_IMPORTS = {"backends/triton/__init__.py"}
# Libraries by path: the extension, from the package's own folder.
ALLOWED_LIBRARIES = {"_extension.py"}


def dotted(node: ast.expr) -> str:
    """``a.b.c`` of an expression, empty if it is none of that form."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        outer = dotted(node.value)
        return f"{outer}.{node.attr}" if outer else ""
    return ""


def is_forbidden(name: str) -> bool:
    return any(name == one or name.startswith(f"{one}.") for one in FORBIDDEN_NAMES) or any(
        name.startswith(one) for one in ("os.exec", "os.spawn")
    )


def offences(source: str, file: str) -> Iterator[str]:
    """Yield what a source must not have."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Call):
            name = dotted(node.func)
            names = [name]
            if name in FORBIDDEN_CALLS:
                yield f"{file}:{node.lineno}: {name}()"
            if name.endswith("import_module") and file not in ALLOWED_IMPORTS:
                yield f"{file}:{node.lineno}: {name}()"
            if name.endswith("load_library") and file not in ALLOWED_LIBRARIES:
                yield f"{file}:{node.lineno}: {name}()"
        elif isinstance(node, ast.Attribute):
            names = [dotted(node)]
        else:
            continue
        for name in names:
            if is_forbidden(name):
                yield f"{file}:{node.lineno}: {name}"


@pytest.mark.parametrize("file", SOURCES)
def test_no_source_runs_text_pickles_processes_or_connections(file: str) -> None:
    assert list(offences((PACKAGE / file).read_text(), file)) == []


@pytest.mark.parametrize(
    "source",
    [
        "eval('1')",
        "exec(text)",
        "import pickle",
        "from pickle import loads",
        "import os\nos.system('x')",
        "import os\nos.execv('x', [])",
        "import torch\ntorch.load(file, weights_only=True)",
        "from torch import load",
        "from urllib.request import urlopen",
        "import subprocess as s",
        "def f():\n    import socket",
        "from importlib import import_module\nimport_module(name)",
        "import torch\ntorch.ops.load_library(path)",
    ],
)
def test_that_would_be_noticed(source: str) -> None:
    assert list(offences(source, "some.py"))


def test_the_environment_is_read_in_one_place_that_says_so() -> None:
    """Only to print what is set; csrc reads ``WSAM_FUSED_CPU_ISA``, which is a name of three."""
    readers = {
        file
        for file in SOURCES
        for node in ast.walk(ast.parse((PACKAGE / file).read_text()))
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv")
    }
    assert readers == {"__main__.py"}


def test_native_code_opens_no_files_and_starts_nothing() -> None:
    calls = re.compile(r"\b(system|popen|fork|execv\w*|dlopen|socket|fopen|ifstream|ofstream)\s*\(")
    sources = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".cpp", ".h", ".cu", ".cuh")]
    assert len(sources) > 20
    found = [
        f"{path.name}: {match.group(1)}"
        for path in sources
        for match in calls.finditer(re.sub(r"//.*", "", path.read_text()))
    ]
    assert found == []


# ---- dependencies --------------------------------------------------------------------------------


def test_torch_is_the_only_dependency_and_all_have_a_lowest_version() -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 cannot read pyproject.toml")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    needed = project["project"]["dependencies"]
    assert [re.split(r"[<>=~!]", name)[0] for name in needed] == ["torch"]
    optional = project["project"]["optional-dependencies"].values()
    everything = [*needed, *(name for names in optional for name in names)]
    assert all(re.fullmatch(r"[\w.-]+>=\d+(\.\d+)*", name) for name in everything), everything


_NEW_MODULES = """
import sys
import torch, torch.distributed.tensor, torch.utils.checkpoint
before = {name.partition(".")[0] for name in sys.modules}
import wsam_fused, wsam_fused.landscape, wsam_fused.schedules
after = {name.partition(".")[0] for name in sys.modules} - before
print(*sorted(after - set(sys.stdlib_module_names)))
"""


def test_nothing_but_torch_is_imported() -> None:
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _NEW_MODULES],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.split() == ["wsam_fused"]
