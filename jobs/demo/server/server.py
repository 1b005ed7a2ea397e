"""Runs the demo's web server on localhost in a child process, which ends with its parent even if that is killed.

Reads `images/` of a world folder. A thread would share the interpreter lock with the pipeline that downloads from it.
"""

import errno
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import TracebackType

from jobs.demo.child_process import exit_with_parent
from jobs.demo.server.picture_server import PictureServer
from jobs.demo.server.routes import ROUTES
from retrieval.errors import UserError

HOST = "127.0.0.1"
BACKLOG = 512
REPOSITORY = Path(__file__).resolve().parents[3]


class WorldServer:
    """Serves a world during its `with` block. Each URL of the route `flaky` fails once for each start.

    port: 0 takes a free one, which is the attribute `port` from the start on.
    Raises UserError on entry if the port is taken or the folder has no world.
    """

    def __init__(self, folder: Path, port: int) -> None:
        self.folder = folder.resolve()
        self.port = port
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """The beginning of every picture's URL, without a slash at the end."""
        return f"http://{HOST}:{self.port}"

    def __enter__(self) -> "WorldServer":
        if not (self.folder / "world.json").is_file():
            raise UserError(
                f"{self.folder} has no world.json: it contains no finished demo world. Run 'make demo' first."
            )
        with open_port(self.port) as listener:
            self.port = listener.getsockname()[1]
            arguments = [str(listener.fileno()), str(self.folder), str(os.getpid())]
            self._process = subprocess.Popen(
                [sys.executable, "-m", "jobs.demo.server.server", *arguments],
                cwd=REPOSITORY,
                pass_fds=[listener.fileno()],
                stdout=subprocess.PIPE,
                start_new_session=True,  # Ctrl-C reaches only the command, which then leaves this block
            )
        assert self._process.stdout is not None
        if self._process.stdout.readline() != b"ready\n":
            raise RuntimeError(f"the demo's server failed to start and ended with code {self._process.wait()}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        self._process.kill()
        self._process.wait()
        self._process.stdout.close()


def open_port(port: int) -> socket.socket:
    """A socket that listens on the loopback port. Raises UserError if it is taken."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((HOST, port))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        if error.errno not in (errno.EADDRINUSE, errno.EACCES):
            raise
        raise UserError(
            f"demo world: cannot serve on {HOST}:{port}: {error.strerror}. Stop the program that listens "
            f"there (another demo?) or choose another port with --set world.port=NUMBER. The world is then "
            f"drawn again, because its URLs contain the port."
        ) from error
    return listener


def _serve(descriptor: int, folder: Path, parent_pid: int) -> None:
    """Serve on an inherited socket, in the child process."""
    exit_with_parent(parent_pid)
    print("ready", flush=True)
    listener = socket.socket(fileno=descriptor)
    server = PictureServer((HOST, listener.getsockname()[1]), folder, ROUTES)
    server.socket.close()
    server.socket = listener
    server.serve_forever()


if __name__ == "__main__":
    _serve(int(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
