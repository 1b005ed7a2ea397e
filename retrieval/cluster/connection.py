"""The connection to Ray, for the pipeline's stages and the actors of a `Cluster`.

Ray waits for many minutes for a cluster that is gone, and its errors at the start have many types. Here they become a
UserError within seconds.
"""

import logging
import os
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray

from retrieval.errors import UserError

OBJECT_STORE_BYTES = 1 << 29
"""Object store of a local Ray. No stage sends large objects."""
CONNECT_S = 10.0
"""Time for a cluster to answer."""
SOCKET_NAME = "/ray/session_2026-01-01_00-00-00_000000_0000000/sockets/plasma_store"
"""The longest name that Ray adds to its temporary folder for a socket."""
MAX_SOCKET_BYTES = 107
SHORT_FOLDER = "/tmp/ray"
CLIENT_SCHEME = "ray://"
# RFC 9113: what a client sends first, with an empty SETTINGS frame. The answer is a SETTINGS frame, of type 4.
HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])

log = logging.getLogger("ray")


@contextmanager
def ray_connection() -> Iterator[None]:
    """Connect to RAY_ADDRESS, or start Ray on this machine, until the block ends. Keeps an existing connection.

    Raises UserError if the cluster does not answer, has other versions, or if Ray cannot start here.
    """
    if ray.is_initialized():
        yield
        return
    # Without this, a local Ray writes a token to the home folder and refuses other processes.
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    address = os.environ.get("RAY_ADDRESS", "") or "local"
    options: dict[str, Any] = {"log_to_driver": True, "logging_level": logging.WARNING}
    if address == "local":
        options |= {"include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES, **_temp_dir()}
        problem = "Ray cannot start on this machine"
    else:
        check_address(address)
        problem = f"cannot connect to the Ray cluster at RAY_ADDRESS={address}"
    try:
        ray.init(address=address, **options)
    except Exception as error:  # Ray raises a plain Exception too
        ray.shutdown()
        raise UserError(f"{problem}: {type(error).__name__}: {error}") from error
    try:
        yield
    finally:
        ray.shutdown()


def _temp_dir() -> dict[str, str]:
    """The option for Ray's temporary folder, if the names of its sockets would be too long in the usual one."""
    folder = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    if len(os.fsencode(folder + SOCKET_NAME)) <= MAX_SOCKET_BYTES:
        return {}
    log.warning("%s is too long for the names of sockets: Ray's logs and sockets are in %s", folder, SHORT_FOLDER)
    return {"_temp_dir": SHORT_FOLDER}


def check_address(address: str) -> None:
    """Raise UserError if no Ray cluster answers at an address such as `head:6379` or `ray://head:10001`."""
    if address.startswith(("http://", "https://")):
        raise UserError(
            f"RAY_ADDRESS={address} is the address of a dashboard. Wanted: host and port of the head, such as "
            "head:6379; on another machine, 'make <stage> CLUSTER=' with the address of the dashboard."
        )
    host, _, port = address.removeprefix(CLIENT_SCHEME).rpartition(":")
    if not port.isdigit() or not host:
        return  # such as auto: Ray looks for a cluster on this machine
    deadline = time.monotonic() + CONNECT_S
    while (problem := _problem(host.strip("[]"), int(port))) and time.monotonic() < deadline:
        time.sleep(0.5)
    if problem:
        raise UserError(
            f"no Ray cluster answers at RAY_ADDRESS={address}: {problem}. Start the cluster, correct RAY_ADDRESS (port "
            "6379 of the head, unless it was started with another one), or unset it to run on this machine."
        )


def _problem(host: str, port: int) -> str:
    """Why no gRPC server, such as Ray's, answers at a port; empty if one does."""
    try:
        with socket.create_connection((host, port), timeout=CONNECT_S / 2) as connection:
            if os.environ.get("RAY_USE_TLS", "0") == "1":
                return ""
            connection.sendall(HTTP2_PREFACE)
            answer = connection.recv(9)
    except OSError as error:
        return str(error)
    return "" if answer[3:4] == b"\x04" else "another program uses this port"
