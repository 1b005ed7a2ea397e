"""A Ray that cannot be reached or started is an error within seconds."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest
import ray

from retrieval.cluster import connection
from retrieval.cluster.connection import check_address
from retrieval.errors import UserError
from tests.jobs.free_ports import free_ports

CONNECT = """
from retrieval.cluster.connection import ray_connection
from retrieval.errors import UserError
try:
    with ray_connection():
        print("connected")
except UserError as error:
    print("refused:", error)
"""


def connect(first: str, **environment: str) -> str:
    """What a process prints that runs the statement `first` and connects to Ray."""
    variables = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "RAY_TMPDIR")}
    command = [sys.executable, "-c", first + CONNECT]
    result = subprocess.run(
        command, env=variables | environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert "Traceback" not in result.stderr
    return result.stdout + result.stderr


@pytest.fixture
def http_port() -> Iterator[int]:
    server = HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield server.server_port
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_a_cluster_that_is_gone_is_an_error_within_seconds(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "CONNECT_S", 0.6)
    [port] = free_ports(1)
    started = time.monotonic()
    with pytest.raises(UserError, match=rf"RAY_ADDRESS={scheme}127.0.0.1:{port}: .*refused.*unset it to run on this"):
        check_address(f"{scheme}127.0.0.1:{port}")
    assert time.monotonic() - started < 5


def test_a_host_that_does_not_exist_or_answer_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "CONNECT_S", 0.4)
    with pytest.raises(UserError, match=r"no Ray cluster answers at RAY_ADDRESS=head\.invalid:6379"):
        check_address("head.invalid:6379")
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with pytest.raises(UserError, match="timed out"):
            check_address(f"127.0.0.1:{silent.getsockname()[1]}")


def test_a_port_of_another_program_is_an_error(http_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "CONNECT_S", 0.4)
    with pytest.raises(UserError, match="another program uses this port"):
        check_address(f"127.0.0.1:{http_port}")


@pytest.mark.usefixtures("ray_cluster")
def test_a_running_cluster_answers_and_refuses_another_version() -> None:
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


def test_too_little_memory_is_an_error_without_a_traceback() -> None:
    output = connect("from retrieval.cluster import connection; connection.OBJECT_STORE_BYTES = 1 << 50")
    assert "refused: Ray cannot start on this machine: ValueError: After taking into account object store" in output
