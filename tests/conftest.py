"""Fixtures of all tests: one Ray, one tiny demo and one fork server for all, and the order of the files."""

import gc
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from s3fs import S3FileSystem
from xdist.remote import Producer
from xdist.scheduler import LoadFileScheduling

from benchmarks.crashes.store import Store, running_store
from tests.fork_server import (
    SHARED_FOLDER,
    WORKERS_ARE_FORKS,
    forked_client,
    library_client,
    share_folder,
    share_vocabulary,
)
from tests.jobs.demo.tiny_demo import TinyDemo, run_once

LONG = (
    "test_demo.py",
    "test_launching.py",
    "test_train.py",
    "test_crashes.py",
    "test_docs.py",
    "test_cluster.py",
    "test_monitoring.py",
    "test_clip.py",
    "test_chain_in_bucket.py",
    "test_lora.py",
)
"""Files that take longest, in this order. test_docs.py waits for the tiny demo, which test_demo.py makes."""
RAY = (
    "test_launching.py",
    "test_docs.py",
    "test_runner.py",
    "test_cluster.py",
    "test_shared.py",
    "test_parts.py",
    "test_ray_gpus.py",
    "pipeline/download/test_download.py",
    "test_connection.py",
    "test_examples.py",
    "benchmarks/training/test_attribution.py",
)
"""Files that need a Ray. One process has them all, because a Ray takes ten seconds to start and uses CPU when idle."""


FREE_DISK = 4 << 30
"""Bytes that the temporary files of the tests may take."""


def pytest_sessionstart() -> None:
    """Stop before the first test where the disk is too full. Many tests would fail otherwise, each by another error."""
    folder = tempfile.gettempdir()
    free = shutil.disk_usage(folder).free
    if free < FREE_DISK:
        message = (
            f"{folder} has {free / 1e9:.1f} GB free, the tests need {FREE_DISK / 1e9:.1f}: free some, or set TMPDIR"
        )
        pytest.exit(message, returncode=2)


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Name bytes by their argument. A gzip body holds the second it was made in, which differs between processes."""
    return argname if isinstance(val, bytes) else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files of LONG first, so that the processes end at about the same time."""
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


def pytest_configure() -> None:
    """Collect no garbage during the imports of the tests, which takes two seconds."""
    gc.disable()


def pytest_collection_finish() -> None:
    """Collect garbage from now on, but not among the objects of the imports: each time it takes a third of a second."""
    gc.freeze()
    gc.enable()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print why tests were skipped, one line for each reason: a missing browser must not go unnoticed."""
    reasons = Counter(report.longrepr[2] for report in terminalreporter.stats.get("skipped", []))
    for reason, count in reasons.items():
        terminalreporter.write_line(f"{count} tests {reason[:1].lower()}{reason[1:]}")


class FileScheduling(LoadFileScheduling):
    """Gives each file to one process, and all files of RAY to the same one."""

    def _split_scope(self, nodeid: str) -> str:
        file: str = super()._split_scope(nodeid)
        return "ray" if file.endswith(RAY) else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> FileScheduling:
    return FileScheduling(config, log)


def pytest_xdist_setupnodes(config: pytest.Config) -> None:
    share_folder(config._tmp_path_factory.getbasetemp())


@pytest.fixture(scope="session")
def ray_cluster(forked_python: Path) -> Iterator[None]:
    """A local Ray with two CPUs, to which stages connect."""
    os.environ["RAY_AUTH_MODE"] = "disabled"
    ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=1 << 28, logging_level="warning")
    yield
    ray.shutdown()


@pytest.fixture(scope="session", autouse=True)
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all test processes share."""
    if SHARED_FOLDER not in os.environ:
        share_folder(tmp_path_factory.getbasetemp())
    return Path(os.environ[SHARED_FOLDER])


@pytest.fixture(scope="session", autouse=True)
def shared_vocabulary() -> None:
    """Encoders of this process share the vocabulary of their tokenizers."""
    share_vocabulary()


@pytest.fixture(scope="session")
def forked_python(shared_folder: Path) -> Path:
    """A program that takes the arguments of `python` and runs them in a fork with the libraries imported.

    Workers of a Ray that is started afterwards are such forks too: their imports take nine seconds otherwise.
    """
    os.environ[WORKERS_ARE_FORKS] = json.dumps({"runtime_env": {"py_executable": str(library_client())}})
    return forked_client()


@pytest.fixture(scope="module")
def object_store(forked_python: Path) -> Iterator[Store]:
    """An empty S3 store for the tests of a module."""
    with running_store(str(forked_python)) as store:
        S3FileSystem.clear_instance_cache()  # removes clients of another module's store
        yield store
    S3FileSystem.clear_instance_cache()


@pytest.fixture(scope="session")
def tiny_demo(shared_folder: Path, forked_python: Path) -> TinyDemo:
    """A complete run of the tiny demo, made once for all test processes. Tests must not change it."""
    return run_once(shared_folder / "tiny-demo", forked_python)
