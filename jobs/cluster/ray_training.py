"""Training on Ray: each worker of a TorchTrainer is one rank and runs `trainer.training.train.run`.

Writes the same files as torchrun, and Ray Train's state to `ray/` of the run. After a lost worker or a NodeError all
restart from the newest checkpoint, as long as each attempt has written a new one. Ranks do not receive SIGTERM here.
"""

import logging
import os
from functools import partial

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError, WorkerGroupError
from ray.train.torch import TorchConfig, TorchTrainer

from retrieval.cluster.connection import ray_connection
from retrieval.errors import NodeError, UserError
from retrieval.storage.root import Root
from trainer.checkpoint.checkpoint import CheckpointFolder
from trainer.engine.deepspeed_engine import check_ranks
from trainer.recipe import TrainingRecipe
from trainer.training import train as stage

log = logging.getLogger("train")


def train_on_ray(config: TrainingRecipe, root: Root) -> None:
    """Train with `train.ranks` workers, or one for each GPU. Raises as `fit_with_restarts`."""
    checkpoints = stage.checkpoints_of(stage.prepare(config, root), root)
    with ray_connection():
        check_ranks(config.train, ranks_on_ray(config))
        fit_with_restarts(make_trainer(config, root), checkpoints, config.train.steps)


def fit_with_restarts(trainer: TorchTrainer, checkpoints: CheckpointFolder, steps: int) -> None:
    """Train to step `steps`, and start again after a lost worker or a NodeError if the attempt wrote a new checkpoint.

    Raises the UserError of a worker if there was one, else TrainingFailedError.
    """

    def own_step() -> int:  # checkpoints that `train.restart` deletes are no progress of this run
        return 0 if checkpoints.is_unusable(steps) else checkpoints.newest_step()

    while True:
        step_before = own_step()
        try:
            trainer.fit()
            return
        except TrainingFailedError as error:
            problem = _user_error(error)
            if problem and not isinstance(problem, NodeError):
                raise problem from None
            newest_step = own_step()
            if newest_step <= step_before:
                raise problem or error from None
            log.warning(f"restarting from step {newest_step:,}: {problem or 'a worker was lost'}")


def ranks_on_ray(config: TrainingRecipe) -> int:
    """Workers to start; call it inside `ray_connection`."""
    return config.train.ranks or max(1, int(ray.cluster_resources().get("GPU", 0)))


def make_trainer(config: TrainingRecipe, root: Root) -> TorchTrainer:
    """The trainer of a run, on GPUs if the cluster has any; call it inside `ray_connection`."""
    gpus = ray.cluster_resources().get("GPU", 0) > 0
    if not gpus:
        log.warning("the Ray cluster has no GPU at present: training on CPUs")
    folder = f"{config.train.folder}/ray"
    storage = str(root.local_path(folder)) if root.is_local else root.at(folder)
    return TorchTrainer(
        partial(_run_rank, config, root, os.getcwd()),
        # Ray Train makes the process group, which DeepSpeed takes as it is.
        torch_config=TorchConfig(timeout_s=60 * config.train.timeout_minutes),
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


def _user_error(error: TrainingFailedError) -> UserError | None:
    """The UserError among the failures of a worker group; a NodeError only if there is no other."""
    failures = error.worker_failures.values() if isinstance(error, WorkerGroupError) else ()
    problems = [failure for failure in failures if isinstance(failure, UserError)]
    return min(problems, key=lambda problem: isinstance(problem, NodeError), default=None)
