"""The client of the fork server behaves like `python`."""

import signal
import subprocess
import time
from pathlib import Path

import pytest


def test_a_command_has_the_arguments_folder_environment_and_streams_of_its_client(
    forked_python: Path, tmp_path: Path
) -> None:
    code = "import os, sys; print(sys.argv[1:], os.getcwd(), os.environ['COLOR'], input()); sys.exit('no red')"
    options = {"cwd": tmp_path, "env": {"COLOR": "red"}, "input": "a line", "capture_output": True, "text": True}
    done = subprocess.run([forked_python, "-c", code, "a", "b"], check=False, **options)
    assert done.stdout == f"['a', 'b'] {tmp_path} red a line\n"
    assert (done.returncode, done.stderr) == (1, "no red\n")


def test_a_command_ends_with_its_threads_and_exit_functions_and_frees_nothing(forked_python: Path) -> None:
    code = "import atexit, sys, threading; atexit.register(print, 'end');"
    code += "threading.kept = type('', (), {'__del__': lambda self: print('freed')})();"
    code += "threading.Timer(0.1, print, ['thread']).start(); sys.exit(3)"
    done = subprocess.run([forked_python, "-c", code], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (3, "thread\nend\n", "")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_to_the_client_ends_its_command(forked_python: Path, number: signal.Signals) -> None:
    code = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    with subprocess.Popen([forked_python, "-c", code], stdout=subprocess.PIPE, text=True) as client:
        assert client.stdout
        command = Path("/proc") / client.stdout.readline().strip()
        client.send_signal(number)
        assert client.wait(timeout=30) == -number
    for _ in range(300):
        if not command.exists():
            return
        time.sleep(0.1)
    raise AssertionError("the command outlived its client")
