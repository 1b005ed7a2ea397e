"""Runs Python commands of tests in forks of one process with the libraries imported: a new process takes ten seconds.

`python fork_server.py SOCKET OWNER MODULE...` is the server; it ends with the process OWNER. Its client takes the
arguments of `python`. The fork has the folder, environment and standard streams of the client, gets its signals, and is
killed with it. It imports the project's packages itself, from the folder of the command, unless they are a MODULE.
"""

import atexit
import gc
import marshal
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from copy import copy
from importlib import import_module
from pathlib import Path
from typing import NoReturn

from filelock import FileLock

TORCHRUN = ("torch.distributed.elastic.rendezvous.c10d_rendezvous_backend", "torch.distributed.launcher.api")
LIBRARIES = (
    "boto3",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "diffusers.models.autoencoders.autoencoder_kl",
    "diffusers.models.unets.unet_2d_condition",
    "diffusers.schedulers.scheduling_ddim",
    "faiss",
    "jinja2",
    "matplotlib.pyplot",
    "moto.s3.urls",
    "moto.server",
    "open_clip",
    "pandas",
    "pyarrow.parquet",
    "torch.utils.tensorboard",
)
WITH_RAY = ("ray.train.torch",)
CLIENT = """#!{python} -IS
import marshal, os, signal, socket, sys

server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
server.connect({address!r})
socket.send_fds(server, [marshal.dumps((sys.argv[1:], os.getcwd(), dict(os.environ)))], [0, 1, 2])
child = int(server.recv(16))
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, _: os.kill(child, number))
code = int(server.recv(16))
if code < 0:
    if -code != signal.SIGKILL:
        signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
sys.exit(code)
"""


WORKERS_ARE_FORKS = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Environment variable of Ray that starts the workers of a new Ray with a client. Not for Ray's job servers, which kill
the process group of a job."""
NO_THREAD = "JE_ARROW_MALLOC_CONF"
"""Environment variable of Arrow, for an allocator without a thread. The imports read it."""
SHARED_FOLDER, OWNER = "TESTS_SHARED_FOLDER", "TESTS_OWNER"
"""Environment variables: the folder that all test processes share, and the process with which the servers end."""


def share_folder(folder: Path) -> None:
    """Set the shared folder. This process becomes the owner of the servers."""
    os.environ |= {SHARED_FOLDER: str(folder), OWNER: str(os.getpid())}


def torchrun_client() -> Path:
    """The client for torchrun, which walks all imported modules in each of its steps: the server has torch alone."""
    return shared_client("torchrun", sys.executable, TORCHRUN)


def library_client() -> Path:
    """The client of a server without Ray, which reads its settings from the environment when it is imported."""
    return shared_client("libraries", str(torchrun_client()), LIBRARIES)


def forked_client() -> Path:
    """The client for commands of the repository."""
    return shared_client("forks", str(library_client()), WITH_RAY)


def shared_client(name: str, python: str, modules: Sequence[str]) -> Path:
    """The client of a server that all test processes share. The first process starts it."""
    folder = Path(os.environ[SHARED_FOLDER]) / name
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            folder.mkdir()
            start_server(folder, python, modules)
    return folder / "python"


def start_server(folder: Path, python: str, modules: Sequence[str]) -> None:
    """Start a server with `python`, and write its client to the folder."""
    address = Path(tempfile.mkdtemp(dir="/tmp")) / "socket"  # a socket's path has 107 bytes at most
    client = folder / "python"
    command = [python, __file__, str(address), os.environ[OWNER], *modules]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "RAY_AUTH_MODE": "disabled",
        NO_THREAD: "background_thread:false",
    }
    server = subprocess.Popen(command, stdin=subprocess.DEVNULL, env=environment)
    while not address.exists():
        assert server.poll() is None, "the fork server did not start"
        time.sleep(0.01)
    client.write_text(CLIENT.format(python=sys.executable, address=str(address)))
    client.chmod(0o755)


def share_vocabulary() -> None:
    """Let tokenizers of open_clip, if it is imported, share a vocabulary: to read it takes a quarter of a second."""
    if "open_clip.factory" in sys.modules:
        sys.modules["open_clip.factory"].SimpleTokenizer = tokenizer


def tokenizer(context_length: int) -> object:
    """A copy of open_clip's default tokenizer with another context length."""
    copied = copy(sys.modules["open_clip.tokenizer"]._tokenizer)
    copied.context_length = context_length
    return copied


def serve(address: str, owner: int, modules: Sequence[str]) -> None:
    """Fork for each client until the owner has ended."""
    sys.path[0] = ""  # this folder has folders with the names of our packages
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(f"{address}.new")
    listener.listen(64)
    listener.settimeout(0.5)
    os.rename(f"{address}.new", address)  # clients may connect, and wait for the imports
    gc.disable()
    for module in modules:
        import_module(module)
    share_vocabulary()
    del sys.path[0]
    # A thread may hold a lock at the time of a fork, and then the fork waits for it forever.
    assert len(os.listdir("/proc/self/task")) == 1, "an import started a thread"
    gc.freeze()  # a collection would copy the pages of all objects in each fork
    gc.enable()
    while Path(f"/proc/{owner}").exists():
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        try:
            client = listener.accept()[0]
        except TimeoutError:
            continue
        if not os.fork():
            listener.close()
            run_for(client)
        client.close()
    shutil.rmtree(Path(address).parent)


def run_for(client: socket.socket) -> NoReturn:
    """Run the command of a client in a child of this process."""
    request, streams, *_ = socket.recv_fds(client, 1 << 20, 3)
    arguments, folder, environment = marshal.loads(request)
    child = os.fork()
    if not child:
        client.close()
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(folder)
        sys.path[:0] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
        run_to_the_end(arguments)
    for stream in streams:
        os.close(stream)
    client.send(str(child).encode())
    if client in select.select([os.pidfd_open(child), client], [], [])[0]:
        os.kill(child, signal.SIGKILL)  # the client was killed
    _, status = os.waitpid(child, 0)
    with suppress(BrokenPipeError):
        client.send(str(os.waitstatus_to_exitcode(status)).encode())
    os._exit(0)


def run_to_the_end(arguments: list[str]) -> NoReturn:
    """Run `python <arguments>` and end this process. It frees no objects, which would copy the pages of all."""
    code = 0
    try:
        run(arguments)
    except SystemExit as end:
        if not isinstance(end.code, int | None):
            raise
        code = end.code or 0
    threading._shutdown()  # waits for the threads
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run(arguments: list[str]) -> None:
    """Run `python <arguments>` in this process."""
    option, *sys.argv = arguments[arguments[0] == "-u" :]
    if option == "-m":
        sys.path.insert(0, os.getcwd())
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    elif option == "-c":
        sys.path.insert(0, "")
        exec(sys.argv[0], {"__name__": "__main__"})
    else:
        sys.argv.insert(0, option)
        sys.path.insert(0, str(Path(option).parent))
        runpy.run_path(option, run_name="__main__")


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]), sys.argv[3:])
