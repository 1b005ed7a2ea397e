"""`make bench-step`: overhead of the training loop over a minimal loop with the same network.

Trains the demo's model in fp32 with `trainer.training.train` and DeepSpeed: with ZeRO 0 on one rank, and, as a
process of torchrun, with ZeRO 1. Between its steps, two other loops train on the same batch: a minimal loop of
diffusers' UNet and torch's AdamW, in DistributedDataParallel on several ranks, and an equivalent loop that also clips
gradients and averages weights, as ours does. Counts the waits for a GPU in an interval of the log. Writes
`docs/step.json` and `docs/step.md`.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from benchmarks.common.device_waits import counted_waits
from benchmarks.common.processes import set_single_rank
from benchmarks.common.report import DOCS, REPOSITORY, SCRATCH, thread_count, write_report
from benchmarks.training.training_data import Extent, prepare
from jobs.cli.recipe import load_recipe
from jobs.reporting.hardware import hardware
from jobs.reporting.tables import markdown_table
from retrieval.storage.root import Root
from trainer.data.loader import Loader, TrainingBatch
from trainer.model import diffusion
from trainer.model.autoencoder import draw_latents
from trainer.model.recipe import DiffusionConfig, ModelConfig
from trainer.model.unet import build_unet
from trainer.recipe import TrainConfig, TrainingRecipe
from trainer.tracking.training_log import read_step_metrics
from trainer.training import train

GOAL = 0.05
SHOWN = ("zero_stage", "ranks", "overhead", "reading", "overhead_equivalent", "waits", "counter")
WARM_UP_STEPS = 5
"""First steps, the first interval of the log. Their waits are counted, and not their time."""
BATCH = 16
EXTENT = Extent(shards=4, rows=200, k=8, dim=128, size=64, factor=4, channels=8)
LOOPS = ("bare", "whole", "ours")

PAGE = """# Overhead of the training loop

Written by `make bench-step`; the numbers are in `step.json`.

**Machine:** {hardware}, {threads} of torch {torch}.

The demo's network ({parameters:,} parameters), batches of {batch} latents, fp32, {steps} steps. In every step each loop
trains on the same batch, in the same processes, one after the other; medians of rank 0. On several ranks the
other loops use torch's DistributedDataParallel. Our time includes everything: reading the batch (within the
step, not ahead as in training), DeepSpeed, averaged weights, checks and logging. ZeRO 1 shards the optimizer
over ranks; the goal is for ZeRO 0 on one rank and for ZeRO 1 on several.
"""
SECTION = """
## ZeRO {zero_stage}, ranks: {ranks}

{table}

Overhead over the minimal loop: **{overhead:+.1%}** of its CPU time (median over steps{verdict}), of which
reading the data is {reading:.1%}. Overhead over the equivalent loop: {overhead_equivalent:+.1%}. After the
last step the losses of our loop and of the equivalent loop differ by {difference:.1e}. A step of our loop waits
{waits:g} times for a GPU, by {counter}.
"""
RANK, WORLD = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
ZERO_STAGE = 0 if WORLD == 1 else 1


@dataclass
class StepTimes:
    """Seconds of every step by loop; CPU seconds of our loop for reading data; losses of the loop `whole`."""

    wall: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in LOOPS})
    cpu: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in LOOPS})
    reading: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    waits: int = 0
    """Waits for a GPU of our loop in the warm-up."""


class MinimalLoop:
    """A minimal training loop. whole: also clip gradients and average weights."""

    def __init__(self, config: TrainingRecipe, whole: bool) -> None:
        self._config, self._whole = config, whole
        torch.manual_seed(config.train.seed)
        unet = build_unet(config.model)
        self._unet = unet if WORLD == 1 else DistributedDataParallel(unet)
        self._optimizer = torch.optim.AdamW(
            self._unet.parameters(), lr=config.train.learning_rate, weight_decay=config.train.weight_decay, fused=True
        )
        self._average = [weight.detach().clone() for weight in self._unet.parameters()]
        self._alphas_bar = diffusion.alphas_bar(config.diffusion)
        self._steps = 0
        self.loss = torch.zeros(())
        """Mean loss of the last batch of this rank."""

    def step(self, batch: TrainingBatch) -> None:
        """One optimizer step."""
        x_0 = draw_latents(batch.inputs.float(), batch.posterior_noise)
        abar = self._alphas_bar[batch.timesteps]
        x_t = diffusion.q_sample(x_0, batch.noise, abar)
        predicted = self._unet(x_t, batch.timesteps, batch.context.float(), return_dict=False)[0]
        target = diffusion.target(self._config.diffusion.prediction, x_0, batch.noise, abar)
        loss = torch.nn.functional.mse_loss(predicted, target)
        loss.backward()
        if self._whole:
            torch.nn.utils.clip_grad_norm_(self._unet.parameters(), self._config.train.max_grad_norm)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._steps += 1
        if self._whole:
            decay = min(self._config.train.ema_decay, (1 + self._steps) / (10 + self._steps))
            torch._foreach_lerp_(self._average, [w.detach() for w in self._unet.parameters()], 1 - decay)
        self.loss = loss.detach()


def interleaved_loader(config: TrainingRecipe, times: StepTimes) -> type[Loader]:
    """A loader that runs the other loops on each batch before it returns the batch to our loop."""

    class InterleavedLoader(Loader):
        def batches(self, first_step: int, last_step: int) -> Generator[TrainingBatch]:
            with torch.random.fork_rng():
                loops = {"bare": MinimalLoop(config, False), "whole": MinimalLoop(config, True)}
            for step in range(first_step, last_step):
                reading = _Clock()
                batch = self.batch(step)
                reading.stop()
                # The order alternates, so that each loop is the first equally often.
                for name in sorted(loops, reverse=bool(step % 2)):
                    clock = _Clock()
                    loops[name].step(batch)
                    clock.stop()
                    times.wall[name].append(clock.wall)
                    times.cpu[name].append(clock.cpu)
                loss = loops["whole"].loss
                dist.all_reduce(loss)
                times.losses.append(loss.item() / WORLD)
                ours = _Clock()
                if step < WARM_UP_STEPS:
                    host = [value for value in vars(batch).values() if isinstance(value, torch.Tensor)]
                    with counted_waits(host) as waits:
                        yield batch
                    times.waits += len(waits)
                else:
                    yield batch
                ours.stop()
                times.wall["ours"].append(ours.wall + reading.wall)
                times.cpu["ours"].append(ours.cpu + reading.cpu)
                times.reading.append(reading.cpu)

    return InterleavedLoader


class _Clock:
    def __init__(self) -> None:
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def stop(self) -> None:
        """Replace the start times by the seconds since then."""
        self.wall, self.cpu = time.perf_counter() - self.wall, time.process_time() - self.cpu


def measure(config: TrainingRecipe, root: Root) -> StepTimes:
    """Run the training stage with the other loops between its steps."""
    if WORLD == 1:
        set_single_rank()
    times = StepTimes()
    with mock.patch.object(train, "Loader", interleaved_loader(config, times)):
        train.run(config, root)
    return times


def summary(times: StepTimes, config: TrainingRecipe, root: Root) -> dict[str, Any]:
    """Medians over the steps after the first WARM_UP_STEPS, in milliseconds, and overheads."""
    counted = {name: (times.wall[name][WARM_UP_STEPS:], times.cpu[name][WARM_UP_STEPS:]) for name in LOOPS}
    cpu = {name: seconds[: len(counted["ours"][1])] for name, (_, seconds) in counted.items()}
    last = read_step_metrics(root.local_path(config.train.folder) / "metrics.jsonl")[-1]
    return {
        "zero_stage": config.train.zero_stage,
        "ranks": WORLD,
        "ms": {
            name: {"wall": statistics.median(wall) * 1000, "cpu": statistics.median(used) * 1000}
            for name, (wall, used) in counted.items()
        },
        "overhead": _excess(cpu["ours"], cpu["bare"]),
        "reading": _excess(times.reading[WARM_UP_STEPS:], cpu["bare"]) + 1,
        "overhead_equivalent": _excess(cpu["ours"], cpu["whole"]),
        "waits": times.waits / WARM_UP_STEPS,
        "counter": "torch" if torch.cuda.is_available() else "a stand-in on the CPU",
        "loss_difference": abs(last.loss - times.losses[last.step - 1]),
    }


def page(result: dict[str, Any]) -> str:
    """The page as Markdown."""
    facts = {name: result[name] for name in ("hardware", "threads", "torch", "steps", "batch", "parameters")}
    return PAGE.format(**facts) + "".join(_section(run) for run in result["runs"])


def _section(run: dict[str, Any]) -> str:
    titles = {
        "bare": "minimal loop: UNet, AdamW",
        "whole": "equivalent loop: also clipping and averaged weights",
        "ours": "**ours**",
    }
    bare = run["ms"]["bare"]
    rows = [
        [titles[name], f"{ms['wall']:.1f}", f"{ms['cpu']:.1f}", f"{ms['cpu'] / bare['cpu'] - 1:+.1%}"]
        for name, ms in run["ms"].items()
    ]
    verdict = f"; goal {GOAL:.0%}: {'reached' if run['overhead'] <= GOAL else 'missed'}"
    return SECTION.format(
        **{name: run[name] for name in SHOWN},
        verdict=verdict if (run["zero_stage"] > 0) == (run["ranks"] > 1) else "",
        difference=run["loss_difference"],
        table=markdown_table(["loop", "ms per step, wall:", "ms per step, CPU:", "CPU time over minimal loop:"], rows),
    )


def _excess(ours: list[float], theirs: list[float]) -> float:
    """Median over steps of ours / theirs - 1."""
    return statistics.median(our_s / their_s for our_s, their_s in zip(ours, theirs, strict=False)) - 1


def _recipe(root: Root, options: argparse.Namespace) -> TrainingRecipe:
    """The demo's recipe without warm-up, with one checkpoint after the last step."""
    changes: dict[str, object] = {"name": f"bench-{WORLD}", "steps": options.steps, "zero_stage": ZERO_STAGE}
    changes |= {"ranks": WORLD, "global_batch": options.batch, "micro_batch": options.batch // WORLD}
    changes |= {"interleaved_shards": 4, "checkpoint_every": options.steps, "log_every": WARM_UP_STEPS}
    changes |= {"validation_images": 0, "validate_every": 0, "preview_every": 0, "kid_every": 0}
    changes |= {"preview_prompts": [], "warmup_steps": 0, "learning_rate_decay": "none", "start_from": ""}
    overrides = [f"train.{name}={value}" for name, value in changes.items()]
    demo = load_recipe(REPOSITORY / "jobs" / "configs" / "demo.toml", overrides)
    while RANK and not (root.exists("extent.json") and root.read_json("extent.json") == vars(EXTENT)):
        time.sleep(0.1)  # rank 0 writes the training set
    return TrainingRecipe(
        model=demo[ModelConfig],
        diffusion=demo[DiffusionConfig],
        autoencoder=prepare(root, EXTENT),
        train=demo[TrainConfig],
    )


def _other_runs(path: Path, result: dict[str, Any]) -> list[dict[str, Any]]:
    """The runs of other numbers of ranks that the same machine has measured in the same way."""
    earlier = json.loads(path.read_text()) if path.exists() else {}
    same = all(earlier.get(name) == value for name, value in result.items())
    return [run for run in earlier["runs"] if run["ranks"] != WORLD] if same else []


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training.step", description=__doc__)
    parser.add_argument("--scratch", type=Path, default=SCRATCH, help="folder of the data and the run")
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder of the results")
    parser.add_argument("--steps", type=int, default=80, help=f"steps to train, at least {WARM_UP_STEPS + 2}")
    parser.add_argument("--batch", type=int, default=BATCH, help="latents of a step")
    options = parser.parse_args()
    root = Root(options.scratch / "step")
    config = _recipe(root, options)
    times = measure(config, root)
    if RANK:
        return
    result = {
        "hardware": hardware(),
        "torch": torch.__version__,
        "threads": thread_count(torch.get_num_threads()),
        "steps": options.steps,
        "batch": options.batch,
        "parameters": sum(weight.numel() for weight in build_unet(config.model).parameters()),
    }
    runs = [*_other_runs(options.docs / "step.json", result), summary(times, config, root)]
    root.delete(config.train.folder)  # the next call trains again
    result |= {"runs": sorted(runs, key=lambda run: run["ranks"])}
    write_report(options.docs, "step", result, page(result))


if __name__ == "__main__":
    main()
