"""Runs ranks to their end for tests, forked from one process that imports the trainer once.

test_train and test_launching test the real launchers.
"""

import multiprocessing
import os
import socket
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path

from retrieval.storage.root import Root
from trainer.recipe import TrainingRecipe

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "trainer.training.train",
        # Modules that training imports later.
        "deepspeed.runtime.zero.muon.muon_optimizer",
        "diffusers.models.autoencoders.autoencoder_kl",
        "diffusers.models.unets.unet_2d_condition",
        "diffusers.schedulers.scheduling_ddim",
        "open_clip",
        "pandas",
        "torch.utils.tensorboard",
    ]
)
TESTS = Path(__file__).parents[1]
# Ranks import modules of these folders by short names, because site-packages may have a package `tests`.
sys.path += [str(TESTS), *(str(TESTS / room) for room in ("checkpoint", "engine", "training"))]


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
    processes = start_ranks(argv, log, ranks)
    for process in processes:
        process.join(timeout=300)
    codes = [process.exitcode for process in processes]
    return next((code for code in codes if code != 0), 0), log.read_text()


def start_ranks(argv: list[str], log: Path, ranks: int) -> list[BaseProcess]:
    """Start `python -m <argv>` on some ranks."""
    from forked import run_rank

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    log.write_bytes(b"")
    processes: list[BaseProcess] = []
    for rank in range(ranks):
        store = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
        environment = address | store | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
        processes.append(FORKS.Process(target=run_rank, args=(argv, log, environment), daemon=True))
        processes[-1].start()
    return processes


def folder_of(recipe: TrainingRecipe, root: Root) -> Path:
    """The run's training folder."""
    return root.local_path(recipe.train.folder)
