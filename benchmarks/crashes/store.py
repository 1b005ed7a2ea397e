"""An object store with simulated outages: moto's S3 server in a child process behind a TCP proxy.

`python -m benchmarks.crashes.store` is the child process: it prints its port and ends with its parent. The
store is in memory; nothing is written to disk.
"""

import logging
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from socketserver import StreamRequestHandler, ThreadingTCPServer

from benchmarks.common.report import REPOSITORY
from jobs.demo.child_process import exit_with_parent

BUCKET = "crashes"
UNAVAILABLE = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
HOST = "127.0.0.1"


class Proxy(ThreadingTCPServer):
    """Forwards connections to a port, except during a simulated outage."""

    daemon_threads = True

    def __init__(self, target: int) -> None:
        super().__init__((HOST, 0), _Connection)
        self.target = target
        self.is_cut = False
        self.unavailable = 0
        """Number of next connections that are answered with status 503."""
        self.sockets: set[socket.socket] = set()
        self.port = int(self.server_address[1])
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def cut(self) -> None:
        """Close all connections, and every new one, until `restore`."""
        self.is_cut = True
        self.end_connections()

    def end_connections(self) -> None:
        """Close the open connections; new ones are accepted."""
        for end in list(self.sockets):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def restore(self) -> None:
        """End the outage."""
        self.is_cut = False

    def handle_error(self, request: object, client_address: object) -> None:
        """Errors of closed connections are expected and not logged."""


class _Connection(StreamRequestHandler):
    server: Proxy

    def handle(self) -> None:
        if self.server.is_cut:
            return
        if self.server.unavailable:
            self.server.unavailable -= 1
            self.connection.recv(1 << 16)
            self.connection.sendall(UNAVAILABLE)
            return
        with socket.create_connection((HOST, self.server.target)) as upstream:
            pair = {self.connection, upstream}
            self.server.sockets |= pair
            back = threading.Thread(target=_forward, args=(upstream, self.connection), daemon=True)
            back.start()
            _forward(self.connection, upstream)
            back.join()
            self.server.sockets -= pair


def _forward(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(1 << 16):
            target.sendall(data)
    with suppress(OSError):
        target.shutdown(socket.SHUT_WR)


@dataclass(frozen=True)
class Store:
    """A running store with an empty bucket."""

    proxy: Proxy

    def url(self, name: str) -> str:
        """The URL of a folder in the bucket."""
        return f"s3://{BUCKET}/{name}"


def environment(port: int) -> dict[str, str]:
    """Environment variables of a client of the store at a local port."""
    return {
        "AWS_ENDPOINT_URL": f"http://{HOST}:{port}",
        "AWS_ACCESS_KEY_ID": "crashes",
        "AWS_SECRET_ACCESS_KEY": "crashes",
        "AWS_DEFAULT_REGION": "us-east-1",
    }


@contextmanager
def running_store(python: str = sys.executable) -> Iterator[Store]:
    """Start a store with `python`, and set its environment variables for this process and its children."""
    command = [python, "-m", "benchmarks.crashes.store"]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    proxy = Proxy(int(process.stdout.readline()))
    store = Store(proxy)
    before = dict(os.environ)
    os.environ.update(environment(proxy.port))
    try:
        yield store
    finally:
        os.environ.clear()
        os.environ.update(before)
        proxy.shutdown()
        proxy.server_close()
        process.kill()
        process.wait()


def main() -> None:
    """Serve until the parent process ends."""
    import boto3
    from moto.server import ThreadedMotoServer

    exit_with_parent(os.getppid())
    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    server = ThreadedMotoServer(HOST, 0, verbose=False)
    server.start()
    port = server.get_host_and_port()[1]
    os.environ.update(environment(port))
    boto3.client("s3").create_bucket(Bucket=BUCKET)
    print(port, flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main()
