"""The extension is loaded from the package's own folder, whatever lies about elsewhere.

Each test copies the package and imports it in a process of its own.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from wsam_fused import _extension

LIBRARY = _extension._library("_C")
pytestmark = pytest.mark.skipif(
    _extension.UNAVAILABLE is not None, reason=str(_extension.UNAVAILABLE)
)
# Says what was loaded, and whether anything came out of the folder of the planted files.
_REPORT = """
import sys, torch
from wsam_fused import _extension
print(_extension.UNAVAILABLE)
print(_extension.READ_GRADIENTS is not None)
print(*torch.ops.loaded_libraries, sep=",")
print([name for name, module in sys.modules.items()
       if "planted" in str(getattr(module, "__file__", ""))])
"""


def copied(folder: Path, *, library: bool) -> Path:
    """Copy the package, with or without the extension; return where it can be imported."""
    package = Path(_extension.__file__).parent
    shutil.copytree(package, folder / "wsam_fused", ignore=shutil.ignore_patterns("*.so", "*.pyd"))
    if library:
        assert LIBRARY is not None
        shutil.copy(LIBRARY, folder / "wsam_fused")
    return folder


def planted(folder: Path) -> Path:
    """Make a folder with libraries of our names: real ones, and a module that leaves a mark."""
    assert LIBRARY is not None
    folder.mkdir()
    for name in (LIBRARY.name, "_cuda.abi3.so", "libwsam_fused.so"):
        shutil.copy(LIBRARY, folder / name)
    mark = f"open({str(folder / 'ran')!r}, 'w').close()\n"
    for name in ("_C.py", "_cuda.py"):
        (folder / name).write_text(mark)
    return folder


def report(package: Path, plants: Path, **environment: str) -> list[str]:
    """Import the copy where the planted files are in every place that loaders look in."""
    places = {
        "PYTHONPATH": f"{package}{os.pathsep}{plants}",
        "LD_LIBRARY_PATH": str(plants),
        "PATH": f"{plants}{os.pathsep}{os.environ['PATH']}",
        "HOME": str(plants),
    }
    run = subprocess.run(
        [sys.executable, "-c", _REPORT],
        cwd=plants,
        env={**os.environ, **places, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return run.stdout.splitlines()


def test_files_in_other_folders_are_not_loaded(tmp_path: Path) -> None:
    package = copied(tmp_path / "package", library=True)
    plants = planted(tmp_path / "planted")
    reason, has_reader, libraries, foreign = report(package, plants)
    assert reason == "None"
    assert has_reader == "True"
    assert LIBRARY is not None
    assert libraries == str((package / "wsam_fused" / LIBRARY.name).resolve())
    assert foreign == "[]"
    assert not (plants / "ran").exists()


def test_nor_are_they_where_the_package_has_none(tmp_path: Path) -> None:
    """A valid library in the working directory and in every path is not taken instead."""
    package = copied(tmp_path / "package", library=False)
    plants = planted(tmp_path / "planted")
    variables = {name: str(plants / "_C.abi3.so") for name in ("WSAM_FUSED_C", "WSAM_FUSED_LIB")}
    reason, has_reader, libraries, foreign = report(package, plants, **variables)
    assert reason.startswith("the extension is not built")
    assert (has_reader, libraries, foreign) == ("False", "", "[]")
    assert not (plants / "ran").exists()


def test_operations_and_reader_come_from_one_file(tmp_path: Path) -> None:
    """A build that was left over under Python's own suffix was imported beside the newer one."""
    package = copied(tmp_path / "package", library=True)
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    (package / "wsam_fused" / f"_C{suffix}").write_bytes(b"not a library")
    plants = planted(tmp_path / "planted")
    reason, has_reader, libraries, _ = report(package, plants)
    assert reason == "None"
    assert libraries.endswith(".abi3.so")
    assert has_reader == "True"


def test_a_file_that_is_no_library_is_a_reason(tmp_path: Path) -> None:
    package = copied(tmp_path / "package", library=False)
    (package / "wsam_fused" / "_C.abi3.so").write_bytes(b"not a library")
    reason, has_reader, _, _ = report(package, planted(tmp_path / "planted"))
    assert reason.startswith("_C.abi3.so does not load with torch")
    assert has_reader == "False"


def test_reasons_within_this_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "_C.so"
    file.write_bytes(b"not a library")
    monkeypatch.setattr(_extension, "_library", lambda name: file)
    reason = _extension._load()
    assert reason is not None
    assert reason.startswith("_C.so does not load with torch")
    assert _extension._load_reader() is None, "operations without a reader are used as they are"
    monkeypatch.setattr(_extension, "_library", lambda name: None)
    reason = _extension._load()
    assert reason is not None
    assert reason.startswith("the extension is not built; run")
    monkeypatch.setattr(_extension, "UNAVAILABLE", reason)
    assert _extension._load_reader() is None
    assert _extension.cuda_unavailable.__wrapped__() == reason
    assert _extension.cpu_instruction_set() == "none"


def test_the_library_says_no_folder_where_others_are_looked_for() -> None:
    """A RUNPATH would be looked in for torch's libraries, which are in the process already."""
    readelf = shutil.which("readelf")
    if readelf is None:
        pytest.skip("there is no readelf")
    dynamic = subprocess.run(
        [readelf, "-d", str(LIBRARY)], capture_output=True, text=True, check=True
    ).stdout
    assert "NEEDED" in dynamic
    assert "RPATH" not in dynamic
    assert "RUNPATH" not in dynamic
