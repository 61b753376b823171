"""Mutation testing: changes a source in one place and runs the tests that concern it.

``python -m benchmarks.reliability.mutants`` does so for every place. A mutant that the tests pass
has survived: either a test is missing, or the change is none (``equivalent_mutants.py`` says why).

A script of our own, because mutmut puts a trampoline around every function, so that it leaves the
rows of the methods alone, which are constants of modules and classes, and because cosmic-ray starts
an interpreter for every mutant, which takes torch longer than the tests. Here a process that has
imported torch is forked for each.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import importlib.util
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import CodeType

import pytest
import torch

from benchmarks.reliability.equivalent_mutants import EXPLAINED
from benchmarks.reliability.mutations import Mutant, mutants

ROOT = Path(__file__).resolve().parents[2]
TIME_LIMIT = 120.0  # seconds; a mutant that runs longer is killed, in both senses

# Source -> tests that compare with the equations, the quickest first, as arguments of pytest.
_STEPS = ["tests/test_rows.py", "tests/test_hand_computed.py"]
_PLAIN = ("sam", "wsam", "gsam", "gnp", "bsam")
TESTS: dict[str, list[str]] = {
    **{f"methods/{name}.py": _STEPS for name in _PLAIN},
    "methods/esam.py": [*_STEPS, "tests/test_esam.py"],
    "methods/rwsam.py": [*_STEPS, "tests/test_rwsam.py"],
    "row.py": _STEPS,
    "coefficients.py": _STEPS,
    "base_rules.py": _STEPS,
    "backends/eager.py": ["tests/test_hand_computed.py", "tests/test_oracle.py"],
}


class _MutantFinder:
    """Gives the import system one module in a changed form."""

    def __init__(self, name: str, path: Path, mutant: Mutant) -> None:
        code = compile(mutant.tree, str(path), "exec")

        class Loader(SourceFileLoader):
            def get_code(self, fullname: str) -> CodeType:
                return code

        self.name = name
        self.spec = importlib.util.spec_from_file_location(
            name, path, loader=Loader(name, str(path))
        )

    def find_spec(self, name: str, path: object, target: object = None) -> ModuleSpec | None:
        return self.spec if name == self.name else None


def passes(tests: Sequence[str], finder: _MutantFinder | None = None) -> bool | None:
    """Run tests in a fork, with one module changed if there is a finder; None if it takes long."""
    child = os.fork()
    if child == 0:
        status = 3
        try:
            _redirect_output()
            if finder is not None:
                sys.meta_path.insert(0, finder)  # type: ignore[arg-type]
            status = int(_run(tests))
        finally:
            os._exit(status)
    end = time.monotonic() + TIME_LIMIT
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status) == pytest.ExitCode.OK
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return None
        time.sleep(0.02)


def _redirect_output() -> None:
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)


def _run(tests: Sequence[str]) -> int | pytest.ExitCode:
    options = ["-x", "-q", "--noconftest", "-p", "no:cacheprovider", "--tb=no"]
    options += ["-o", "addopts="]  # for plugins, which are not loaded
    fixtures = ["-p", "benchmarks.reliability.mutation_fixtures"]
    # What is the same on every mutant, and long.
    deselected = ["-k", "not emulated and not triton and not changed_checkpoint"]
    return pytest.main([*options, *fixtures, *deselected, *tests])


def judge(file: str, first: int, last: int, every: int) -> Counter[str]:
    """Run all mutants of one source, print those that survive, and count.

    Raises:
        RuntimeError: The tests fail as it is.
    """
    if not passes(TESTS[file]):
        raise RuntimeError(f"the tests of {file} do not pass unchanged")
    path = ROOT / "wsam_fused" / file
    name = ".".join(("wsam_fused", *Path(file).with_suffix("").parts))
    found: Counter[str] = Counter()
    inside = [m for m in mutants(path.read_text()) if first <= m.line <= last]
    for mutant in inside[::every]:
        survived = passes(TESTS[file], _MutantFinder(name, path, mutant))
        change = f"{mutant.before} -> {mutant.after}"
        reason = EXPLAINED.get((file, change)) or EXPLAINED.get(("*", change))
        if survived is None:
            found["too slow"] += 1
        elif not survived:
            found["killed"] += 1
        else:
            found["explained" if reason else "survived"] += 1
            text = f"{file}:{mutant.line}: {change}" + (f"  ({reason})" if reason else "")
            print(text, flush=True)
    return found


def _prepare() -> None:
    """Import, before any fork, all that the package and its tests import, and not the package."""
    torch.set_num_threads(1)
    os.chdir(ROOT)
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    sys.path.insert(0, str(ROOT / "tests"))
    importlib.import_module("hypothesis")
    importlib.import_module("numpy")
    package = importlib.import_module("wsam_fused")
    param = torch.nn.Parameter(torch.ones(1))
    optimizer = package.SAM([param], torch.optim.AdamW)  # imports much the first time
    optimizer.step(lambda: param.sum().backward())
    copy.deepcopy(optimizer)
    for name in [name for name in sys.modules if name.partition(".")[0] == "wsam_fused"]:
        del sys.modules[name]


def main(argv: Sequence[str] | None = None) -> None:
    """Judge the sources that are asked for and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("files", nargs="*", help="below wsam_fused/; all that there are tests for")
    parser.add_argument(
        "--lines", type=int, nargs=2, default=(1, 10**6), help="only mutants from line to line"
    )
    parser.add_argument("--every", type=int, default=1, help="only one in so many")
    arguments = parser.parse_args(argv)
    unknown = [file for file in arguments.files if file not in TESTS]
    if unknown:
        parser.error(f"files is {unknown}, expected some of {', '.join(TESTS)}")
    _prepare()
    rows = ["| source | mutants | killed | too slow | no change, explained | survived |"]
    rows.append("|---|---|---|---|---|---|")
    for file in arguments.files or TESTS:
        start = time.monotonic()
        found = judge(file, *arguments.lines, arguments.every)
        columns = [found[key] for key in ("killed", "too slow", "explained", "survived")]
        seconds = time.monotonic() - start
        rows.append(f"| `{file}` | {found.total()} | {' | '.join(map(str, columns))} |")
        print(f"{file}: {found.total()} mutants in {seconds:.0f} s: {dict(found)}", flush=True)
    print("\n".join(rows))


if __name__ == "__main__":
    main()
