"""Runs ranks to their end for tests, forked from one process that has imported the trainer.

test_train and test_launching test the real launchers.
"""

import os
import socket
import subprocess
from pathlib import Path
from typing import Any

from retrieval.storage.root import Root
from tests.fork_server import forked_client, shared_client
from trainer.recipe import TrainingRecipe

TESTS = Path(__file__).parents[1]
# Ranks import modules of these folders by short names, because site-packages may have a package `tests`.
FOLDERS = [str(TESTS), *(str(TESTS / room) for room in ("checkpoint", "engine", "training"))]


def train(recipe: TrainingRecipe, root: Root, ranks: int = 1) -> str:
    """Train to the end on some ranks. Returns the log."""
    code, log = try_to_train(recipe, root, ranks)
    assert code == 0, log
    return log


def try_to_train(recipe: TrainingRecipe, root: Root, ranks: int = 1) -> tuple[int, str]:
    """Train on some ranks. Returns the first nonzero exit code, else 0, and the log."""
    path = root.local_path("recipe.json")
    path.write_text(recipe.model_dump_json())
    return fork(["train_rank", str(path), root.url], root.local_path("log"), ranks)


def fork(argv: list[str], log: Path, ranks: int) -> tuple[int, str]:
    """Run `python -m <argv>` on some ranks. Returns the first nonzero exit code, else 0, and the log."""
    codes = [process.wait(timeout=300) for process in start_ranks(argv, log, ranks)]
    return next((code for code in codes if code != 0), 0), log.read_text()


def start_ranks(argv: list[str], log: Path, ranks: int) -> list[subprocess.Popen[bytes]]:
    """Start `python -m <argv>` on some ranks, with a new log of what they write to stderr."""
    python = shared_client("ranks", str(forked_client()), ["trainer.training.train"])
    log.write_bytes(b"")
    with socket.socket() as port, log.open("ab") as stderr:
        # The clients keep the port from other processes. With this option rank 0 may use it.
        port.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        port.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port.getsockname()[1])}
        shared = os.environ | address | {"PYTHONPATH": os.pathsep.join(FOLDERS), "WORLD_SIZE": str(ranks)}
        options: dict[str, Any] = {"stderr": stderr, "pass_fds": [port.fileno()]}
        return [
            subprocess.Popen(
                [python, "-m", *argv], env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, **options
            )
            for rank in range(ranks)
        ]


def folder_of(recipe: TrainingRecipe, root: Root) -> Path:
    """The run's training folder."""
    return root.local_path(recipe.train.folder)
