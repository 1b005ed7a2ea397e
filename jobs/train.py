"""`python -m jobs.train RECIPE`: trains the retrieval-augmented diffusion model with DeepSpeed.

Started by hand it launches one process for each GPU (or `train.ranks` of them) on this machine, with
`--hosts FILE` on the machines of a hostfile, with `--ray` on a Ray cluster; started by torchrun or
deepspeed it is one of their ranks. The same command resumes, on any number of ranks.
"""

import argparse
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from jobs.cli.command import execute, finish, parser
from jobs.cli.recipe import Recipe
from retrieval.recipe import ClipConfig
from trainer.data.plan import is_finished
from trainer.engine.deepspeed_engine import accumulation_steps
from trainer.recipe import AutoencoderConfig, DiffusionConfig, ModelConfig, TrainConfig, Training
from trainer.training import train as stage
from trainer.training.hosts import check_hosts, read_hosts
from trainer.training.launch import launch, launch_hosts


def run(recipe: Recipe, hostfile: Path | None = None, on_ray: bool = False) -> None:
    """Be a rank, or launch the ranks and wait. Raises UserError before launching if the data do not fit."""
    config = training(recipe)
    if "RANK" in os.environ:
        stage.run(config, recipe.root)
        return
    plan = stage.prepare(config, recipe.root)
    if is_finished(plan, recipe.root):
        logging.getLogger("train").info("already finished: %s", recipe.root.at(config.train.folder))
        return
    if on_ray:
        # Ray is needed here alone.
        from jobs.cluster.ray_training import train_on_ray

        train_on_ray(config, recipe.root)
        return
    code = _launch(config, recipe, hostfile)
    # DeepSpeed's launcher returns 0 where a signal ended what it had started.
    if code or not is_finished(plan, recipe.root):
        raise SystemExit(code or 1)


def training(recipe: Recipe) -> Training:
    """The sections that training reads."""
    return Training(
        model=recipe[ModelConfig],
        diffusion=recipe[DiffusionConfig],
        autoencoder=recipe[AutoencoderConfig],
        train=recipe[TrainConfig],
        clip=recipe[ClipConfig] if recipe[TrainConfig].preview_prompts else None,
    )


def _launch(config: Training, recipe: Recipe, hostfile: Path | None) -> int:
    """Start ranks on this machine or those of a hostfile. Returns their launcher's exit code."""
    argv = ["jobs.train", *recipe.arguments()]
    if hostfile is None:
        ranks = config.train.ranks or max(1, torch.cuda.device_count())
        accumulation_steps(config.train, ranks)
        return launch(argv, ranks)
    hosts = read_hosts(hostfile)
    accumulation_steps(config.train, sum(host.slots for host in hosts))
    check_hosts(hosts)
    return launch_hosts(argv, hostfile, hosts)


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    made = parser("train", __doc__)
    made.add_argument("--hosts", type=Path, metavar="FILE", help="machines to train on: lines 'name slots=8'")
    made.add_argument(
        "--ray", action="store_true", help="train on the Ray cluster of RAY_ADDRESS, or a local one"
    )
    # DeepSpeed's launcher adds this; the environment says the same.
    made.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    return made.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    given = arguments(argv)
    finish(lambda: execute(given, lambda recipe: run(recipe, given.hosts, given.ray)))


if __name__ == "__main__":
    main()
