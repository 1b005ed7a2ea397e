"""Training on Ray: `trainer.training.train.run` in the workers of a TorchTrainer, each of them one rank.

Takes a checked recipe; what is written is the same as by torchrun, and checkpoints stay the run's own.
A worker that is lost takes the others along; all start again from the newest checkpoint, as long as
every attempt writes one. No SIGTERM reaches a rank here. Ray Train keeps its own in the run's `ray/`.
"""

import logging
import os
from functools import partial
from typing import Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError, WorkerGroupError
from ray.train.torch import TorchTrainer

from retrieval.cluster.connection import ray_connection
from retrieval.errors import UserError
from retrieval.storage.root import Root
from trainer.engine.deepspeed_engine import accumulation_steps
from trainer.recipe import TrainingRecipe
from trainer.training import train as stage

log = logging.getLogger("train")


def train_on_ray(config: TrainingRecipe, root: Root) -> None:
    """Train with `train.ranks` workers, or one for each GPU of the cluster. Raises what a worker raised."""
    checkpoints = stage.checkpoints_of(stage.prepare(config, root), root)
    with ray_connection():
        accumulation_steps(config.train, ranks_on_ray(config))
        trainer = _trainer(config, root)
        while True:
            before = checkpoints.newest_step()
            try:
                trainer.fit()
                return
            except TrainingFailedError as error:
                _raise_mistake(error)
                newest = checkpoints.newest_step()
                if newest <= before:
                    raise
                log.warning(f"a worker was lost; going on from step {newest:,}")


def ranks_on_ray(config: TrainingRecipe) -> int:
    """Workers to start; call it inside `ray_connection`."""
    return config.train.ranks or max(1, int(ray.cluster_resources().get("GPU", 0)))


def _trainer(config: TrainingRecipe, root: Root) -> TorchTrainer:
    gpus = ray.cluster_resources().get("GPU", 0) > 0
    storage = root.local_path(config.train.folder) / "ray"
    return TorchTrainer(
        partial(_be_a_rank, config, root, os.getcwd()),
        scaling_config=ScalingConfig(num_workers=ranks_on_ray(config), use_gpu=gpus),
        run_config=RunConfig(
            name=config.train.name, storage_path=str(storage), failure_config=FailureConfig(max_failures=0)
        ),
    )


def _be_a_rank(config: TrainingRecipe, root: Root, folder: str) -> None:
    """What a worker does. folder: paths in the recipe are relative to it."""
    if os.path.isdir(folder):
        os.chdir(folder)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s  %(name)s: %(message)s", force=True)
    stage.run(config, root)


def _raise_mistake(error: TrainingFailedError) -> None:
    """Raise the UserError among a worker group's failures, if there is one."""
    failures: dict[int, Any] = error.worker_failures if isinstance(error, WorkerGroupError) else {}
    for failure in failures.values():
        if isinstance(failure, UserError):
            raise failure from None
