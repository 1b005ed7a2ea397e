"""What tests of several packages share: one Ray for each process that runs tests, and the order of files."""

import os
from collections import Counter
from collections.abc import Iterator

import pytest
import ray

LONG = ("test_demo.py", "test_launching.py", "test_train.py", "test_monitoring.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take minutes come first, so that the processes end at about the same time."""
    items.sort(key=lambda item: item.path.name not in LONG)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print why tests were skipped, one line for each reason: a missing browser must not go unnoticed."""
    reasons = Counter(report.longrepr[2] for report in terminalreporter.stats.get("skipped", []))
    for reason, count in reasons.items():
        terminalreporter.write_line(f"{count} tests {reason[:1].lower()}{reason[1:]}")


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A local Ray with two CPUs, to which stages connect."""
    os.environ["RAY_AUTH_MODE"] = "disabled"
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=1 << 28,
        logging_level="warning",
    )
    yield
    ray.shutdown()
