"""Fixtures of all tests: one Ray for each test process, one tiny demo for all, and the order of the files."""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from filelock import FileLock

from tests.fork_server import start_server
from tests.jobs.demo.tiny_demo import TinyDemo, run_once

LONG = (
    "test_demo.py",
    "test_train.py",
    "test_launching.py",
    "test_crashes.py",
    "test_docs.py",
    "test_cluster.py",
    "test_monitoring.py",
    "test_clip.py",
)
"""Files that take longest, in this order. test_docs.py waits for the tiny demo, which test_demo.py makes."""


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Name bytes by their argument. A gzip body holds the second it was made in, which differs between processes."""
    return argname if isinstance(val, bytes) else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files of LONG first, so that the processes end at about the same time."""
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print why tests were skipped, one line for each reason: a missing browser must not go unnoticed."""
    reasons = Counter(report.longrepr[2] for report in terminalreporter.stats.get("skipped", []))
    for reason, count in reasons.items():
        terminalreporter.write_line(f"{count} tests {reason[:1].lower()}{reason[1:]}")


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A local Ray with two CPUs, to which stages connect."""
    os.environ["RAY_AUTH_MODE"] = "disabled"
    ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=1 << 28, logging_level="warning")
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all test processes share."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


@pytest.fixture(scope="session")
def forked_python(shared_folder: Path) -> Path:
    """A program that takes the arguments of `python` and runs them in a fork with the libraries imported."""
    folder = shared_folder / "fork-server"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            folder.mkdir()
            start_server(folder, os.getppid() if "PYTEST_XDIST_WORKER" in os.environ else os.getpid())
    return folder / "python"


@pytest.fixture(scope="session")
def tiny_demo(shared_folder: Path, forked_python: Path) -> TinyDemo:
    """A complete run of the tiny demo, made once for all test processes. Tests must not change it."""
    return run_once(shared_folder / "tiny-demo", forked_python)
