"""Saves and loads training states on one and two ranks at several ZeRO stages, for test_checkpoint.

`python -m state_moved FOLDER ACTION...` ends with a failed assertion if a loaded
state trains differently. `write` trains, saves a checkpoint, trains on and stores the final weights; `read`
loads every checkpoint, trains on and compares with the final weights.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import deepspeed
import deepspeed.comm as dist
import torch
from safetensors.torch import load_file, save_file
from training_set import make_recipe

from retrieval.storage.root import Root
from trainer.checkpoint.checkpoint import CheckpointFolder, Progress
from trainer.engine.deepspeed_engine import Ranks, join_ranks, make_engine, optimizer_step
from trainer.engine.ema import MovingAverage
from trainer.engine.fragments import MASTER, initialize_moments, owned_fragments

LAYOUTS = [(0, "fp32"), (1, "fp32"), (3, "fp32"), (2, "bf16"), (3, "bf16")]
SAVED_AT, STEPS = 3, 5


class Trained:
    """A tiny network in training at a ZeRO stage and in a number format."""

    def __init__(self, zero_stage: int, precision: str, seed: int, ranks: Ranks) -> None:
        changes = {"zero_stage": zero_stage, "precision": precision, "global_batch": 4, "weight_decay": 0.1}
        # Two groups of parameters, in another order than those of the network.
        changes["decay_norms_and_biases"] = False
        self.config = make_recipe("", **changes).train
        torch.manual_seed(seed)
        # Odd sizes, which cannot be divided evenly.
        layers = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.SiLU(), torch.nn.Linear(5, 3))
        self.shapes = {name: weight.shape for name, weight in layers.named_parameters()}
        self.engine: deepspeed.DeepSpeedEngine = make_engine(layers, self.config, ranks)
        self.average = MovingAverage(owned_fragments(self.engine, MASTER, ranks), 0.5)
        self.ranks = ranks

    def train(self, first: int, last: int) -> None:
        """Train on batches that depend only on the step."""
        dtype = next(self.engine.module.parameters()).dtype
        for step in range(first, last):
            batch = torch.randn(4, 7, generator=torch.Generator().manual_seed(step))
            for rows in batch.chunk(self.ranks.world)[self.ranks.rank].split(self.config.micro_batch):
                self.engine.backward(self.engine(rows.to(dtype)).float().square().mean())
                optimizer_step(self.engine, self.config)
            self.average.update(torch.tensor(step + 1.0), torch.tensor(True))

    def state(self) -> dict[str, torch.Tensor]:
        """The complete fp32 weights and their average."""
        masters = MovingAverage(owned_fragments(self.engine, MASTER, self.ranks), 0.5)
        states = {"master": masters.gather(self.shapes), "average": self.average.gather(self.shapes)}
        return {f"{state}.{name}": values for state, named in states.items() for name, values in named}


def folder_of(folder: Path, world: int, layout: tuple[int, str]) -> CheckpointFolder:
    return CheckpointFolder(Root(folder / f"{world}-{layout[0]}-{layout[1]}"), "test", {}, keep=2, keep_every=0)


def write(folder: Path, ranks: Ranks) -> None:
    for layout in LAYOUTS:
        trained, saved = Trained(*layout, seed=0, ranks=ranks), folder_of(folder, ranks.world, layout)
        initialize_moments(trained.engine, 0)
        trained.train(0, SAVED_AT)
        saved.save(trained.engine, [trained.average], Progress(SAVED_AT), ranks)
        # Train while the thread writes: it writes a copy.
        trained.train(SAVED_AT, STEPS)
        saved.finish()
        end = trained.state()
        if ranks.is_first:
            save_file(end, saved.root.local_path("end.safetensors"))
        trained.engine.destroy()


def read(folder: Path, ranks: Ranks) -> None:
    for world, saved_as, read_as in pairs(folder):
        saved = folder_of(folder, world, saved_as)
        trained = Trained(*read_as, seed=1, ranks=ranks)
        assert saved.load(trained.engine, [trained.average], ranks) == Progress(SAVED_AT)
        trained.train(SAVED_AT, STEPS)
        exact = world == ranks.world
        expected = load_file(saved.root.local_path("end.safetensors"))
        for name, values in trained.state().items():
            message = f"{name} saved by {world} ranks as {saved_as}, read by {ranks.world} as {read_as}"
            rtol, atol = (0.0, 0.0) if exact else (1e-5, 2e-3 if read_as[1] == "bf16" else 1e-6)
            torch.testing.assert_close(values, expected[name], rtol=rtol, atol=atol, msg=message)
        trained.engine.destroy()


def pairs(folder: Path) -> Iterator[tuple[int, tuple[int, str], tuple[int, str]]]:
    """World size and layout of each saved checkpoint, with the next layout of the same precision to load it."""
    for world in (1, 2):
        for precision in ("fp32", "bf16"):
            layouts = [layout for layout in LAYOUTS if layout[1] == precision]
            for saved_as, read_as in zip(layouts, layouts[1:] + layouts[:1], strict=True):
                if folder_of(folder, world, saved_as).newest_step():
                    yield world, saved_as, read_as


if __name__ == "__main__":
    ranks = join_ranks()
    for action in sys.argv[2:]:
        {"write": write, "read": read}[action](Path(sys.argv[1]), ranks)
    dist.barrier()
    dist.destroy_process_group()
