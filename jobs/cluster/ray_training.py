"""Training on Ray: each worker of a TorchTrainer is one rank and runs `trainer.training.train.run`.

Writes the same files as torchrun, and Ray Train's state to `ray/` of the run. If a worker is lost, all restart from
the newest checkpoint, as long as each attempt has written a new one. Ranks do not receive SIGTERM here.
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
from trainer.engine.deepspeed_engine import check_ranks
from trainer.recipe import TrainingRecipe
from trainer.training import train as stage

log = logging.getLogger("train")


def train_on_ray(config: TrainingRecipe, root: Root) -> None:
    """Train with `train.ranks` workers, or one for each GPU. Raises the exception of a failed worker."""
    checkpoints = stage.checkpoints_of(stage.prepare(config, root), root)
    with ray_connection():
        check_ranks(config.train, ranks_on_ray(config))
        trainer = _trainer(config, root)
        while True:
            step_before = checkpoints.newest_step()
            try:
                trainer.fit()
                return
            except TrainingFailedError as error:
                _raise_user_error(error)
                newest_step = checkpoints.newest_step()
                if newest_step <= step_before:
                    raise
                log.warning(f"a worker was lost: restarting from step {newest_step:,}")


def ranks_on_ray(config: TrainingRecipe) -> int:
    """Workers to start; call it inside `ray_connection`."""
    return config.train.ranks or max(1, int(ray.cluster_resources().get("GPU", 0)))


def _trainer(config: TrainingRecipe, root: Root) -> TorchTrainer:
    gpus = ray.cluster_resources().get("GPU", 0) > 0
    folder = f"{config.train.folder}/ray"
    storage = str(root.local_path(folder)) if root.is_local else root.at(folder)
    return TorchTrainer(
        partial(_run_rank, config, root, os.getcwd()),
        scaling_config=ScalingConfig(num_workers=ranks_on_ray(config), use_gpu=gpus),
        run_config=RunConfig(
            name=config.train.name, storage_path=storage, failure_config=FailureConfig(max_failures=0)
        ),
    )


def _run_rank(config: TrainingRecipe, root: Root, folder: str) -> None:
    """The work of one worker. folder: the working directory, which paths in the recipe are relative to."""
    if os.path.isdir(folder):
        os.chdir(folder)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s  %(name)s: %(message)s", force=True)
    stage.run(config, root)


def _raise_user_error(error: TrainingFailedError) -> None:
    """Raise the UserError among the failures of a worker group, if there is one."""
    failures: dict[int, Any] = error.worker_failures if isinstance(error, WorkerGroupError) else {}
    for failure in failures.values():
        if isinstance(failure, UserError):
            raise failure from None
