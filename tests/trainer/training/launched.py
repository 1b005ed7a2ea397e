"""Ranks for tests that need nothing but their end: forked from one process that imports the trainer once.

How ranks are launched for real is what test_train and test_launching test.
"""

import multiprocessing
import socket
import sys
from pathlib import Path

from retrieval.storage.root import Root
from trainer.recipe import Training

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "trainer.training.train",
        # What training imports on its way.
        "deepspeed.runtime.zero.muon.muon_optimizer",
        "diffusers.models.autoencoders.autoencoder_kl",
        "diffusers.models.unets.unet_2d_condition",
        "diffusers.schedulers.scheduling_ddim",
        "pandas",
        "torch.utils.tensorboard",
    ]
)
# Ranks import this repository's tests by name.
sys.path.append(str(Path(__file__).parents[3]))


def train(recipe: Training, root: Root, ranks: int = 1) -> str:
    """Trains to the end on some ranks. Returns the log."""
    code, log = outcome(recipe, root, ranks)
    assert code == 0, log
    return log


def outcome(recipe: Training, root: Root, ranks: int = 1) -> tuple[int, str]:
    """Trains on some ranks. Returns the worst exit code, and the log."""
    path = root.local_path("recipe.json")
    path.write_text(recipe.model_dump_json())
    return fork(["tests.trainer.training.train_rank", str(path), root.url], root.local_path("log"), ranks)


def fork(argv: list[str], log: Path, ranks: int) -> tuple[int, str]:
    """Runs `python -m <argv>` on some ranks. Returns the worst exit code, and the log."""
    from tests.trainer.training.forked import run_rank

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    log.write_bytes(b"")
    started = []
    for rank in range(ranks):
        environment = place | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
        started.append(FORKS.Process(target=run_rank, args=(argv, log, environment), daemon=True))
        started[-1].start()
    for process in started:
        process.join(timeout=300)
    codes = [process.exitcode for process in started]
    return next((code for code in codes if code != 0), 0), log.read_text()


def folder_of(recipe: Training, root: Root) -> Path:
    """The run's folder."""
    return root.local_path(recipe.train.folder)
