"""`laion-rdm train RECIPE`: trains the retrieval-augmented diffusion model with DeepSpeed.

Launches one rank per GPU (or `train.ranks`) on this machine, on those of `--hosts FILE`, or with `--ray` on a Ray
cluster; a process of torchrun or deepspeed is one rank. The same command resumes a run, on any number of ranks.
"""

import argparse
import logging
import os
from collections.abc import Sequence
from pathlib import Path

from jobs.cli.command import exit_on_user_error, run_on_recipe, stage_parser
from jobs.cli.recipe import Recipe
from retrieval.recipe import ClipConfig
from trainer.model.recipe import AutoencoderConfig, DiffusionConfig, ModelConfig
from trainer.recipe import TrainConfig, TrainingRecipe
from trainer.training.hostfile import check_hosts, read_hosts
from trainer.training.launch import launch, launch_hosts


def run(recipe: Recipe, hostfile: Path | None = None, on_ray: bool = False) -> None:
    """Train as a rank, or launch the ranks and wait. Raises UserError if inputs do not fit."""
    # Not at the top: --help and --dry-run answer without torch.
    from trainer.data.plan import is_finished
    from trainer.training import train as stage

    config = training_recipe(recipe)
    if "RANK" in os.environ:
        stage.run(config, recipe.root)
        return
    plan = stage.prepare(config, recipe.root)
    if is_finished(plan, recipe.root):
        logging.getLogger("train").info("already finished: %s", recipe.root.at(config.train.folder))
        return
    if on_ray:
        # Only this branch needs Ray.
        from jobs.cluster.ray_training import train_on_ray

        train_on_ray(config, recipe.root)
        return
    code = _launch(config, recipe, hostfile)
    # DeepSpeed's launcher returns 0 if a signal ended its processes.
    if code or not is_finished(plan, recipe.root):
        raise SystemExit(code or 1)


def training_recipe(recipe: Recipe) -> TrainingRecipe:
    """The sections of a recipe that training reads."""
    train = recipe[TrainConfig]
    return TrainingRecipe(
        model=recipe[ModelConfig],
        diffusion=recipe[DiffusionConfig],
        autoencoder=recipe[AutoencoderConfig],
        train=train,
        clip=recipe[ClipConfig] if train.preview_prompts or train.kid_every else None,
    )


def ranks_here(config: TrainConfig) -> int:
    """Ranks that training starts on this machine. Raises UserError if the batch or the optimizer does not fit them."""
    import torch

    from trainer.engine.deepspeed_engine import check_ranks

    ranks = config.ranks or max(1, torch.cuda.device_count())
    check_ranks(config, ranks)
    return ranks


def _launch(config: TrainingRecipe, recipe: Recipe, hostfile: Path | None) -> int:
    """Start ranks on this machine or on those of a hostfile. Returns the launcher's exit code."""
    from trainer.engine.deepspeed_engine import check_ranks

    argv = ["jobs.train", *recipe.arguments()]
    if hostfile is None:
        return launch(argv, ranks_here(config.train))
    hosts = read_hosts(hostfile)
    check_ranks(config.train, sum(host.slots for host in hosts))
    check_hosts(hosts)
    return launch_hosts(argv, hostfile, hosts)


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = stage_parser("train", __doc__)
    parser.add_argument("--hosts", type=Path, metavar="FILE", help="machines to train on: lines 'name slots=8'")
    parser.add_argument("--ray", action="store_true", help="train on the Ray cluster of RAY_ADDRESS, or a local one")
    # Added by DeepSpeed's launcher; the environment has the same value.
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    exit_on_user_error(lambda: run_on_recipe(arguments, lambda recipe: run(recipe, arguments.hosts, arguments.ray)))


if __name__ == "__main__":
    main()
