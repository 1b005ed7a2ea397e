"""What test_checkpoint runs: training states saved by one and two ranks at every ZeRO stage, loaded by all.

`python -m tests.trainer.checkpoint.state_moved FOLDER WORD...`; ends with a failed assertion if a state does not go on as it would
have. `write` trains, saves, trains on and notes where that ends; `read` trains on from what every writer
saved, and compares.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import deepspeed
import deepspeed.comm as dist
import torch
from safetensors.torch import load_file, save_file
from training_set import make_recipe

from trainer.checkpoint.checkpoint import CheckpointFolder
from trainer.engine.deepspeed_engine import Ranks, join_ranks, make_engine, optimizer_step
from trainer.engine.ema import Average
from trainer.engine.fragments import MASTER, owned

WAYS = [(0, "fp32"), (1, "fp32"), (3, "fp32"), (2, "bf16"), (3, "bf16")]
SAVED_AT, STEPS = 3, 5


class Trained:
    """A tiny network in training, split in one of the ways."""

    def __init__(self, zero_stage: int, precision: str, seed: int, ranks: Ranks) -> None:
        changes = {"zero_stage": zero_stage, "precision": precision, "global_batch": 4, "weight_decay": 0.1}
        self.config = make_recipe("", **changes).train
        torch.manual_seed(seed)
        # Odd sizes: no split of them is even.
        layers = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.SiLU(), torch.nn.Linear(5, 3))
        self.shapes = {name: weight.shape for name, weight in layers.named_parameters()}
        self.engine: deepspeed.DeepSpeedEngine = make_engine(layers, self.config, ranks)
        self.average = Average(owned(self.engine, MASTER, ranks), 0.5)
        self.ranks = ranks

    def train(self, first: int, last: int) -> None:
        """Steps on batches that depend on nothing but the step."""
        dtype = next(self.engine.module.parameters()).dtype
        for step in range(first, last):
            batch = torch.randn(4, 7, generator=torch.Generator().manual_seed(step))
            for rows in batch.chunk(self.ranks.world)[self.ranks.rank].split(self.config.micro_batch):
                self.engine.backward(self.engine(rows.to(dtype)).float().square().mean())
                optimizer_step(self.engine, self.config)
            self.average.update(step + 1)

    def whole(self) -> dict[str, torch.Tensor]:
        """The fp32 weights and their average."""
        masters = Average(owned(self.engine, MASTER, self.ranks), 0.5)
        parts = {"master": masters.gather(self.shapes), "average": self.average.gather(self.shapes)}
        return {f"{part}.{name}": one for part, named in parts.items() for name, one in named}


def folder_of(folder: Path, world: int, way: tuple[int, str]) -> CheckpointFolder:
    return CheckpointFolder(folder / f"{world}-{way[0]}-{way[1]}", "test", {}, keep=2, keep_every=0)


def write(folder: Path, ranks: Ranks) -> None:
    for way in WAYS:
        trained, saved = Trained(*way, seed=0, ranks=ranks), folder_of(folder, ranks.world, way)
        trained.train(0, SAVED_AT)
        saved.save(trained.engine, trained.average, SAVED_AT, ranks)
        # While the thread writes: what it writes is a copy.
        trained.train(SAVED_AT, STEPS)
        saved.finish()
        end = trained.whole()
        if ranks.is_first:
            save_file(end, saved.path / "end.safetensors")
        trained.engine.destroy()


def read(folder: Path, ranks: Ranks) -> None:
    for world, saved_as, read_as in pairs(folder):
        saved = folder_of(folder, world, saved_as)
        trained = Trained(*read_as, seed=1, ranks=ranks)
        assert saved.load(trained.engine, trained.average, ranks) == SAVED_AT
        trained.train(SAVED_AT, STEPS)
        exact = world == ranks.world
        wanted = load_file(saved.path / "end.safetensors")
        for name, values in trained.whole().items():
            text = f"{name} saved by {world} ranks as {saved_as}, read by {ranks.world} as {read_as}"
            rtol, atol = (0.0, 0.0) if exact else (1e-5, 2e-3 if read_as[1] == "bf16" else 1e-6)
            torch.testing.assert_close(values, wanted[name], rtol=rtol, atol=atol, msg=text)
        trained.engine.destroy()


def pairs(folder: Path) -> Iterator[tuple[int, tuple[int, str], tuple[int, str]]]:
    """What was saved, and every way to read it in the same precision."""
    for world in (1, 2):
        for saved_as in WAYS:
            if folder_of(folder, world, saved_as).path.exists():
                for read_as in WAYS:
                    if saved_as[1] == read_as[1]:
                        yield world, saved_as, read_as


if __name__ == "__main__":
    group = join_ranks()
    for word in sys.argv[2:]:
        {"write": write, "read": read}[word](Path(sys.argv[1]), group)
    dist.barrier()
    dist.destroy_process_group()
