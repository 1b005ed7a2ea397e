"""A Ray that cannot be reached or started is an error within seconds."""

import os
import socket
import subprocess
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import pytest
import ray

from retrieval.cluster import connection
from retrieval.cluster.connection import check_address
from retrieval.errors import UserError

CONNECT = """
from retrieval.cluster import connection
from retrieval.cluster.connection import ray_connection
from retrieval.errors import UserError
connection.CONNECT_S = 300
try:
    with ray_connection():
        print("connected")
except UserError as error:
    print("refused:", error)
"""


@pytest.fixture
def connect(forked_python: Path) -> Callable[..., str]:
    """Returns what a process prints that runs the statement `first` and connects to Ray."""

    def run(first: str, **environment: str) -> str:
        variables = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "RAY_TMPDIR")}
        command = [forked_python, "-c", first + CONNECT]
        result = subprocess.run(command, env=variables | environment, capture_output=True, text=True, check=False)
        assert "Traceback" not in result.stderr
        return result.stdout + result.stderr

    return run


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses between attempts, in seconds, which are the only time that passes."""
    pauses: list[float] = []
    clock = SimpleNamespace(monotonic=lambda: sum(pauses), sleep=pauses.append)
    monkeypatch.setattr(connection, "time", clock)
    return pauses


@pytest.fixture
def one_attempt(pauses: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """The time is over after one attempt."""
    monkeypatch.setattr(connection.time, "monotonic", lambda: 1000 * len(pauses))


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port that refuses connections."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        yield unused.getsockname()[1]


@pytest.fixture
def http_port() -> Iterator[int]:
    server = HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield server.server_port
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_a_cluster_that_is_gone_is_an_error_within_seconds(scheme: str, closed_port: int, pauses: list[float]) -> None:
    address = f"{scheme}127.0.0.1:{closed_port}"
    with pytest.raises(UserError, match=rf"RAY_ADDRESS={address}: .*refused.*unset it to run on this"):
        check_address(address)
    assert sum(pauses) == connection.CONNECT_S


@pytest.mark.usefixtures("one_attempt")
def test_a_host_that_does_not_exist_or_answer_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "CONNECT_S", 0.4)
    with pytest.raises(UserError, match=r"no Ray cluster answers at RAY_ADDRESS=head\.invalid:6379"):
        check_address("head.invalid:6379")
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with pytest.raises(UserError, match="timed out"):
            check_address(f"127.0.0.1:{silent.getsockname()[1]}")


@pytest.mark.usefixtures("one_attempt")
def test_a_port_of_another_program_is_an_error(http_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "CONNECT_S", 300)
    with pytest.raises(UserError, match="another program uses this port"):
        check_address(f"127.0.0.1:{http_port}")


@pytest.mark.usefixtures("ray_cluster")
def test_a_running_cluster_answers_and_refuses_another_version(
    connect: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "CONNECT_S", 300)
    address = ray.get_runtime_context().gcs_address
    check_address(address)
    output = connect("import ray; ray.__version__ = '1.2.3'", RAY_ADDRESS=address)
    assert (
        f"refused: cannot connect to the Ray cluster at RAY_ADDRESS={address}: RuntimeError: Version mismatch" in output
    )


def test_addresses_that_ray_resolves_are_left_to_it() -> None:
    check_address("auto")


def test_the_address_of_a_dashboard_is_an_error() -> None:
    with pytest.raises(UserError, match=r"RAY_ADDRESS=http://head:8265 is the address of a dashboard.* head:6379"):
        check_address("http://head:8265")


def test_a_long_temporary_folder_is_replaced_for_sockets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short, long = tmp_path / "s", tmp_path / ("x" * 75)
    long.mkdir()
    monkeypatch.setattr(connection, "SHORT_FOLDER", str(short))
    for folder, options in ((Path("/tmp"), {}), (long, {"_temp_dir": str(short)})):
        monkeypatch.setenv("RAY_TMPDIR", str(folder))
        assert connection._temp_dir() == options
    monkeypatch.delenv("RAY_TMPDIR")
    monkeypatch.setattr(connection.tempfile, "tempdir", str(long))
    assert connection._temp_dir() == {"_temp_dir": str(short)}


def test_too_little_memory_is_an_error_without_a_traceback(connect: Callable[..., str]) -> None:
    output = connect("from retrieval.cluster import connection; connection.OBJECT_STORE_BYTES = 1 << 50")
    assert "refused: Ray cannot start on this machine: ValueError: After taking into account object store" in output
