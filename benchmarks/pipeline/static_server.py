"""A web server that costs little: pictures from memory over kept connections, in a process of its own.

Reads the `*.jpg` of a folder; `/<number>.jpg` is answered with the picture of that number, counted round.
Ends when its standard input does.
"""

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\nConnection: %s\r\n\r\n"
BACKLOG = 512


class Answering(asyncio.Protocol):
    """One connection; requests come one after another, each in one piece or several."""

    def __init__(self, pictures: list[bytes]) -> None:
        self.pictures = pictures
        self.heard = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.heard += data
        while (end := self.heard.find(b"\r\n\r\n")) >= 0:
            request, self.heard = self.heard[:end], self.heard[end + 4 :]
            number = int(request.split(b" ", 2)[1][1:].partition(b".")[0])
            body = self.pictures[number % len(self.pictures)]
            closes = b"connection: close" in request.lower()
            self.transport.writelines([HEAD % (len(body), b"close" if closes else b"keep-alive"), body])
            if closes:
                self.transport.close()


async def serve(folder: Path) -> None:
    """Serve until standard input ends; the port goes to standard output."""
    pictures = [path.read_bytes() for path in sorted(folder.glob("*.jpg"))]
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Answering(pictures), "127.0.0.1", 0, backlog=BACKLOG)
    sys.stdout.write(f"{server.sockets[0].getsockname()[1]}\n")
    sys.stdout.flush()
    await loop.run_in_executor(None, sys.stdin.read)
    server.close()


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """The address of a server of these pictures while the block lasts."""
    command = [sys.executable, "-m", "benchmarks.pipeline.static_server", str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        process.communicate()


if __name__ == "__main__":
    asyncio.run(serve(Path(sys.argv[1])))
