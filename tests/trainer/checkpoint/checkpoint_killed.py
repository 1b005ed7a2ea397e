"""Kills two ranks that write checkpoints at seeded times and checks the checkpoints, for test_checkpoint.

`python -m checkpoint_killed FOLDER` ends with a failed assertion if an indexed
checkpoint is incomplete. The ranks are forked, because they then need no imports. Prints the last step.
"""

import os
import signal
import sys
import tempfile
import time
from itertools import count
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from retrieval.storage.root import Root
from trainer.checkpoint.checkpoint import CheckpointFolder, Progress
from trainer.checkpoint.fragment_files import SavedFragments
from trainer.engine.deepspeed_engine import Ranks
from trainer.engine.fragments import Fragment
from trainer.training.launch import die_with_parent

KILLS, KEPT, KEEP_EVERY = 8, 2, 10
SIZES = (1000, 4_000_000)
"""Number of elements of each rank: rank 0 finishes long before rank 1."""


def folder_at(path: Path) -> CheckpointFolder:
    return CheckpointFolder(Root(path), "test", {}, keep=KEPT, keep_every=KEEP_EVERY)


def rank_process(path: Path, store: str, rank: int) -> None:
    """Write checkpoints in an endless loop; all values of a checkpoint are its step."""
    die_with_parent()
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    checkpoints = folder_at(path)
    begin = checkpoints.newest_step() + 1
    if rank == 0:
        checkpoints.delete_unfinished()
    dist.barrier()
    for step in count(begin):
        tensors = {f"master/w@{rank * SIZES[0]}": torch.full((SIZES[rank],), float(step))}
        checkpoints.save_tensors(tensors, Progress(step), Ranks(rank, 2, torch.device("cpu")))


def start(path: Path, store: str, rank: int) -> int:
    child = os.fork()
    if child == 0:
        try:
            rank_process(path, store, rank)
        finally:
            os._exit(1)
    return child


def wait_beyond(path: Path, step: int) -> None:
    """Wait for a checkpoint after this step."""
    deadline = time.monotonic() + 600
    while folder_at(path).newest_step() <= step:
        assert time.monotonic() < deadline
        time.sleep(0.005)


def check(path: Path) -> int:
    """Check that all indexed checkpoints are complete. Returns the newest step."""
    checkpoints = folder_at(path)
    index = checkpoints._index()
    if index is None:
        return 0
    steps = [entry["step"] for entry in index["checkpoints"]]
    newest = steps[-1]
    permanent = list(range(KEEP_EVERY, newest - KEPT + 1, KEEP_EVERY))
    assert steps == [*permanent, *range(max(1, newest - KEPT + 1), newest + 1)], steps
    # Also one that was being written, and one that was being deleted.
    assert len(list(path.glob("step-*"))) <= len(steps) + 2
    for entry in index["checkpoints"]:
        checkpoints.check_files(entry)
        with SavedFragments(Root(path), entry["tag"], entry["files"]) as saved:
            fragment = Fragment("w", 0, torch.zeros(sum(SIZES)))
            saved.read_into("master", fragment)
        assert bool((fragment.values == entry["step"]).all())
    return newest


def main(path: Path) -> None:
    newest = 0
    for number in range(KILLS):
        rng = np.random.default_rng([5, number])
        with tempfile.TemporaryDirectory() as folder:
            children = [start(path, f"{folder}/store", rank) for rank in (0, 1)]
            wait_beyond(path, newest)
            time.sleep(rng.uniform(0, 0.2))
            for child in rng.permutation(children):
                os.kill(int(child), signal.SIGKILL)
                time.sleep(rng.uniform(0, 0.01))
            for child in children:
                os.waitpid(child, 0)
        previous, newest = newest, check(path)
        assert newest > previous
    folder_at(path).delete_unfinished()
    indexed = {entry["tag"] for entry in folder_at(path)._index()["checkpoints"]}
    assert {file.name for file in path.iterdir()} == {"checkpoints.json", *indexed}
    assert check(path) == newest
    print(newest)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
