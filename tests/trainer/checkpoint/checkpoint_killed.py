"""What test_checkpoint runs: two ranks that do nothing but write checkpoints, killed at seeded moments.

`python -m tests.trainer.checkpoint.checkpoint_killed FOLDER`; ends with a failed assertion if a checkpoint is there in part. The
ranks are forked, so that a kill costs no imports. Prints how many checkpoints were seen.
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

from trainer.checkpoint.checkpoint import CheckpointFolder
from trainer.checkpoint.fragment_files import SavedFragments
from trainer.engine.deepspeed_engine import Ranks
from trainer.engine.fragments import Fragment
from trainer.training.launch import die_with_parent

KILLS, KEPT, KEEP_EVERY = 15, 2, 10
SIZES = (1000, 4_000_000)
"""Elements of each rank: the first is done long before the second."""


def folder_at(path: Path) -> CheckpointFolder:
    return CheckpointFolder(path, "test", {}, keep=KEPT, keep_every=KEEP_EVERY)


def rank_process(path: Path, store: str, rank: int) -> None:
    """Write checkpoints for ever; all values of one are its step."""
    die_with_parent()
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    checkpoints = folder_at(path)
    begin = checkpoints.newest_step() + 1
    if rank == 0:
        checkpoints.sweep()
    dist.barrier()
    for step in count(begin):
        pieces = {f"master/w@{rank * SIZES[0]}": torch.full((SIZES[rank],), float(step))}
        checkpoints.save_pieces(pieces, step, Ranks(rank, 2, torch.device("cpu")))


def start(path: Path, store: str, rank: int) -> int:
    child = os.fork()
    if child == 0:
        try:
            rank_process(path, store, rank)
        finally:
            os._exit(1)
    return child


def wait_beyond(path: Path, step: int) -> None:
    """Wait for a checkpoint after a step."""
    deadline = time.monotonic() + 120
    while folder_at(path).newest_step() <= step:
        assert time.monotonic() < deadline
        time.sleep(0.005)


def check(path: Path) -> int:
    """Everything that the index names is whole. Returns the newest step."""
    checkpoints = folder_at(path)
    index = checkpoints._index()
    if index is None:
        return 0
    steps = [entry["step"] for entry in index["checkpoints"]]
    newest = steps[-1]
    for_good = list(range(KEEP_EVERY, newest - KEPT + 1, KEEP_EVERY))
    assert steps == [*for_good, *range(max(1, newest - KEPT + 1), newest + 1)], steps
    # Besides them one that was being written, and one that was being removed.
    assert len(list(path.glob("step-*"))) <= len(steps) + 2
    for entry in index["checkpoints"]:
        checkpoints._check_files(entry)
        with SavedFragments(path / entry["tag"]) as saved:
            piece = Fragment("w", 0, torch.zeros(sum(SIZES)))
            saved.fill("master", piece)
        assert bool((piece.values == entry["step"]).all())
    return newest


def main(path: Path) -> None:
    seen = [0]
    for number in range(KILLS):
        rng = np.random.default_rng([5, number])
        with tempfile.TemporaryDirectory() as scratch:
            children = [start(path, f"{scratch}/store", rank) for rank in (0, 1)]
            wait_beyond(path, seen[-1])
            time.sleep(rng.uniform(0, 0.2))
            for child in rng.permutation(children):
                os.kill(int(child), signal.SIGKILL)
                time.sleep(rng.uniform(0, 0.01))
            for child in children:
                os.waitpid(child, 0)
        seen.append(check(path))
        assert seen[-1] > seen[-2]
    folder_at(path).sweep()
    named = {entry["tag"] for entry in folder_at(path)._index()["checkpoints"]}
    assert {one.name for one in path.iterdir()} == {"checkpoints.json", *named}
    assert check(path) == seen[-1]
    print(seen[-1])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
