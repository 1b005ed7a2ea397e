"""A fast web server for benchmarks: pictures from memory over keep-alive connections, in a separate process.

Reads the `*.jpg` of a folder; `/<number>.jpg` returns the picture of that number modulo their count, after a delay
that stands for a distant server. Ends when its standard input is closed.
"""

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\nConnection: %s\r\n\r\n"
BACKLOG = 512


class PictureProtocol(asyncio.Protocol):
    """One connection. Requests arrive in sequence, each in one or several chunks. delay_s: before each response."""

    def __init__(self, pictures: list[bytes], delay_s: float) -> None:
        self.pictures = pictures
        self.delay_s = delay_s
        self.received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.received += data
        while (end := self.received.find(b"\r\n\r\n")) >= 0:
            request, self.received = self.received[:end], self.received[end + 4 :]
            number = int(request.split(b" ", 2)[1][1:].partition(b".")[0])
            body = self.pictures[number % len(self.pictures)]
            is_last = b"connection: close" in request.lower()
            asyncio.get_running_loop().call_later(self.delay_s, self.respond, body, is_last)

    def respond(self, body: bytes, is_last: bool) -> None:
        """Send a response."""
        self.transport.writelines([HEAD % (len(body), b"close" if is_last else b"keep-alive"), body])
        if is_last:
            self.transport.close()


async def serve(folder: Path, delay_s: float) -> None:
    """Write the port to standard output and serve until standard input is closed."""
    pictures = [path.read_bytes() for path in sorted(folder.glob("*.jpg"))]
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: PictureProtocol(pictures, delay_s), "127.0.0.1", 0, backlog=BACKLOG)
    sys.stdout.write(f"{server.sockets[0].getsockname()[1]}\n")
    sys.stdout.flush()
    await loop.run_in_executor(None, sys.stdin.read)
    server.close()


@contextmanager
def serve_folder(folder: Path, delay_s: float = 0.0) -> Iterator[str]:
    """Serve the pictures of a folder while the block lasts. Yields the address."""
    command = [sys.executable, "-m", "benchmarks.pipeline.static_server", str(folder), str(delay_s)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        process.communicate()


if __name__ == "__main__":
    asyncio.run(serve(Path(sys.argv[1]), float(sys.argv[2])))
