"""The wheel: what is in it, what it needs of torch, and that other interpreters can use it.

One build is used by all tests, without the CUDA kernels, by the script that `make wheel` runs.
It shares compiled objects with the build in place.

    WSAM_FUSED_TEST_TORCH="2.12.1 /tmp/venv"    test it with other torches as well

A version is installed into an environment of its own, without its dependencies, which the
environment of the tests lends; a folder is a virtual environment of any Python >= 3.10 that has a
torch, and nothing is installed into it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from tolerances import ONE_STEP

ROOT = Path(__file__).parents[1]
OTHERS = os.environ.get("WSAM_FUSED_TEST_TORCH", "").split()
HERE = "this environment"

# What the extension may take from elsewhere: torch's stable C interface, Python's, and the C and
# C++ libraries. A few symbols of `std` have no version, because torch's libraries export them too.
STABLE = re.compile(
    r"aoti_torch_\w+|torch_\w+|_?Py\w+|\S+@(?:GLIBC|GLIBCXX|CXXABI|GCC)_[\d.]+|_ZN?K?St\w+"
)
OF_TORCH = re.compile(r"_Z\w*(?:2at|3c10|5torch)\d")


def run(*command: str | Path, timeout: float = 300, **environment: str) -> str:
    done = subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        cwd="/",  # nothing is imported from here by accident
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build, which leaves nothing else in the tree."""
    if not (ROOT / "setup.py").exists() or shutil.which("g++") is None:
        pytest.skip("needs the sources and a C++ compiler")
    folder = tmp_path_factory.mktemp("dist")
    before = files_of_the_tree()
    run(ROOT / ".ci/wheel", sys.executable, folder, timeout=900, WSAM_FUSED_CUDA="0")
    assert files_of_the_tree() == before
    return folder


def files_of_the_tree() -> set[str]:
    """Return all files but those of builds and what tests, tools and git bring about."""
    listed = subprocess.run(
        ["git", "status", "--short", "--ignored", "--untracked-files=all"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    return {
        line
        for line in listed.stdout.splitlines()
        if not re.search(r" build/|/?(__pycache__|\.\w+_cache|\.hypothesis)/", line)
    }


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    (found,) = dist.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def unpacked(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


def test_tags_say_any_python_and_this_platform(wheel: Path, unpacked: Path) -> None:
    assert re.fullmatch(r"wsam_fused-[\d.]+\w*-cp310-abi3-linux_\w+\.whl", wheel.name)
    (text,) = unpacked.glob("*.dist-info/WHEEL")
    tags = re.findall(r"^Tag: (.*)$", text.read_text(), re.MULTILINE)
    assert tags == ["-".join(wheel.stem.split("-")[2:])]
    assert "Root-Is-Purelib: false" in text.read_text()
    (metadata,) = unpacked.glob("*.dist-info/METADATA")
    assert "Requires-Dist: torch>=2.11" in metadata.read_text()
    assert "Requires-Python: >=3.10" in metadata.read_text()


def test_it_has_the_package_and_nothing_else(unpacked: Path) -> None:
    found = {path.relative_to(unpacked) for path in unpacked.rglob("*") if path.is_file()}
    package = {path for path in found if path.parts[0] == "wsam_fused"}
    expected = {path.relative_to(ROOT) for path in (ROOT / "wsam_fused").rglob("*.py")}
    expected |= {Path("wsam_fused/py.typed"), Path("wsam_fused/_C.abi3.so")}
    assert package == expected
    info = {path.parts[0] for path in found - package}
    assert [name.endswith(".dist-info") for name in info] == [True]


def test_it_does_not_say_where_it_was_built(unpacked: Path) -> None:
    places = [str(ROOT), sys.prefix, sys.base_prefix, str(Path.home()), str(Path(torch.__file__))]
    for path in unpacked.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            for place in places:
                assert place.encode() not in content, f"{path.name} has {place}"


@pytest.mark.skipif(shutil.which("nm") is None, reason="nm is not installed")
def test_it_needs_nothing_of_torch_but_the_stable_interface(unpacked: Path) -> None:
    """No C++ symbol of libtorch, whose mangled names change from version to version."""
    lines = run("nm", "-D", "--undefined-only", unpacked / "wsam_fused/_C.abi3.so").splitlines()
    kinds_and_names = [line.split() for line in lines]
    needed = [name for kind, name in kinds_and_names if kind == "U"]
    assert "torch_parallel_for" in needed, "else nm has not shown what there is"
    assert [name for name in needed if not STABLE.fullmatch(name)] == []
    assert [name for _, name in kinds_and_names if OF_TORCH.match(name)] == []


def test_the_source_distribution_can_be_built_from(dist: Path) -> None:
    (archive,) = dist.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {str(Path(*Path(name).parts[1:])) for name in tar.getnames()}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    package = {str(path.relative_to(ROOT)) for path in (ROOT / "wsam_fused").rglob("*.py")}
    rest = {"setup.py", "pyproject.toml", "README.md", "LICENSE", "wsam_fused/py.typed"}
    assert sources | package | rest <= names
    assert not [name for name in names if name.endswith(".so") or name.startswith("tests")]


def environment_with(torch_from: str, folder: Path) -> Path:
    """Make a virtual environment that has a torch but not this package; return its Python."""
    given = Path(torch_from) / "bin/python"
    python: str | Path = given if given.exists() else sys.executable
    run(python, "-m", "venv", "--without-pip", folder)
    made = folder / "bin/python"
    if torch_from != HERE and not given.exists():
        command = [sys.executable, "-m", "pip", "--python", str(made), "install", "--no-deps"]
        command.append(f"torch=={torch_from}")
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        if done.returncode != 0:
            errors = re.findall(r"^ERROR: (.*)$", done.stderr, re.MULTILINE)
            pytest.skip(f"torch {torch_from} cannot be installed: {'; '.join(errors)}")
    # The rest comes from the environment that has it: this one, or the one that was given.
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    (folder / "lent.pth").write_text(run(python, "-c", where))
    shutil.copy(folder / "lent.pth", run(made, "-c", where).strip())
    imported = subprocess.run([made, "-c", "import torch"], capture_output=True, text=True)
    if imported.returncode != 0:
        pytest.skip(f"torch {torch_from} does not run: {imported.stderr.splitlines()[-1]}")
    return made


@pytest.mark.parametrize(
    "torch_from",
    [
        HERE,
        *OTHERS,
        *(
            []
            if OTHERS
            else [
                pytest.param(
                    "another",
                    marks=pytest.mark.skip(reason="WSAM_FUSED_TEST_TORCH names no other torch"),
                )
            ]
        ),
    ],
)
def test_it_runs_where_it_is_installed(torch_from: str, wheel: Path, tmp_path: Path) -> None:
    folder = tmp_path / "environment"
    python = environment_with(torch_from, folder)
    install = ("install", "--quiet", "--no-deps", "--no-index", "--no-compile")
    run(sys.executable, "-m", "pip", "--python", python, *install, wheel)
    tolerances = {
        str(t).removeprefix("torch."): ONE_STEP[t] for t in (torch.float32, torch.float64)
    }
    smoke = Path(__file__).with_name("wheel_smoke.py")
    assert ": passed" in run(python, "-I", smoke, folder, json.dumps(tolerances))
    report = run(python, "-I", "-m", "wsam_fused")
    assert re.search(r"^cpu +yes$", report, re.MULTILINE), report
    assert re.search(r"^cuda +(?!yes)\S", report, re.MULTILINE), report
