"""Seeds, thread counts, the backends that this machine has, and what GPU checks have found."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import differences
import pytest
import torch
from emulated import EmulatedBackend
from interpreted import interpreted_backend

from wsam_fused.backends import BACKENDS

# The problems are tiny, and threads that wait for each other cost more than they compute.
torch.set_num_threads(1)

# A shell that starts the tests in the background has them ignore Ctrl-C, which some tests raise.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Before any test or library imports Triton, which decides then whether it interprets.
interpreted_backend()

# Behind `eager`, so that "auto" never takes it.
BACKENDS["cuda-emulated"] = EmulatedBackend()

ON_CPU = [
    name
    for name, backend in BACKENDS.items()
    if backend.unavailable() is None and (not backend.DEVICE_TYPES or "cpu" in backend.DEVICE_TYPES)
]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--differences``."""
    text = "write how far apart computations were found to be (see docs/methods.md)"
    parser.addoption("--differences", type=Path, metavar="FILE", help=text)


def pytest_configure(config: pytest.Config) -> None:
    """Collect differences if they are wanted."""
    if config.getoption("--differences"):
        differences.found = []


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Write them, unless a test failed: then they mean nothing."""
    path = session.config.getoption("--differences")
    if path and exitstatus == pytest.ExitCode.OK:
        differences.write(path)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=ON_CPU)
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend that can step parameters on the CPU, by name."""
    return str(request.param)


@pytest.fixture
def errors_on_waiting() -> Iterator[Callable[[], None]]:
    """From its call on, whatever waits for the GPU raises."""
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def threads() -> Iterator[None]:
    """Puts the number of threads back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what tests recorded as "GPU check": how GPU code was checked, with or without a GPU."""
    found = [
        value
        for report in terminalreporter.getreports("passed")
        for name, value in report.user_properties
        if name == "GPU check"
    ]
    if found:
        terminalreporter.section("GPU checks")
        for line in dict.fromkeys(map(str, found)):
            terminalreporter.write_line(line)
