"""Training on Ray: each worker of a TorchTrainer is one rank and runs `trainer.training.train.run`.

Writes the same files as torchrun, and Ray Train's state to `ray/` of the run. After a lost worker or a NodeError all
restart from the newest checkpoint, as long as each attempt has written a new one. Ranks do not receive SIGTERM here.
"""

import logging
import os
from collections.abc import Callable
from functools import partial

from ray.train import ControllerError, FailureConfig, RunConfig, ScalingConfig, TrainingFailedError, WorkerGroupError
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

from jobs.cluster.ray_gpus import RESOURCE, STARTS, limit_start, ranks_on_ray, resources_found, uses_gpus, wait_for_gpus
from jobs.cluster.ray_parts import prepare_process
from retrieval.cluster.connection import ray_connection
from retrieval.errors import NodeError, UserError
from retrieval.storage.root import Root
from trainer.checkpoint.checkpoint import CheckpointFolder
from trainer.engine.deepspeed_engine import check_ranks
from trainer.recipe import TrainingRecipe
from trainer.training import train as stage

log = logging.getLogger("train")


def train_on_ray(config: TrainingRecipe, root: Root) -> None:
    """Train with `train.ranks` workers, or one for each GPU. Raises as `fit` and `fit_with_restarts`."""
    checkpoints = stage.checkpoints_of(stage.prepare(config, root), root)
    with ray_connection():
        check_ranks(config.train, ranks_on_ray(config.train))
        trainer = make_trainer(config, root)
        fit_with_restarts(lambda: fit(trainer, config), checkpoints, config.train.steps)


def fit(trainer: TorchTrainer, config: TrainingRecipe) -> None:
    """Train once, on GPUs after `wait_for_gpus`. Raises UserError if ranks cannot start, or TrainingFailedError."""
    ranks, resource = trainer.scaling_config.num_workers, "CPU"
    assert isinstance(ranks, int)
    if trainer.scaling_config.use_gpu:
        resource = RESOURCE
        wait_for_gpus(ranks, config.train.wait_for_gpus_s)
    limit_s = limit_start(config.train)
    log.info(f"starting {ranks} ranks: Ray waits up to {limit_s:,} s until {ranks} {resource}s are free")
    try:
        trainer.fit()
    except ControllerError as error:
        if not isinstance(error.controller_failure, WorkerGroupStartupTimeoutError):
            raise
        raise UserError(
            f"Ray started no ranks within {limit_s:,} s. Resource {resource}: {resources_found(resource)}, wanted: "
            f"{ranks} free ones, one for each rank. Wait until other jobs end, lower train.ranks, or raise "
            "train.wait_for_gpus_s."
        ) from None


def fit_with_restarts(attempt: Callable[[], None], checkpoints: CheckpointFolder, steps: int) -> None:
    """Train to step `steps`, and start again after a lost worker or a NodeError if the attempt wrote a new checkpoint.

    attempt: trains from the newest checkpoint. Raises the UserError of a worker if there was one, else
    TrainingFailedError.
    """

    def own_step() -> int:  # checkpoints that `train.restart` deletes are no progress of this run
        return 0 if checkpoints.is_unusable(steps) else checkpoints.newest_step()

    while True:
        step_before = own_step()
        try:
            attempt()
            return
        except TrainingFailedError as error:
            problem = _user_error(error)
            if problem and not isinstance(problem, NodeError):
                raise problem from None
            newest_step = own_step()
            if newest_step <= step_before:
                raise problem or error from None
            log.warning(f"restarting from step {newest_step:,}: {problem or 'a worker was lost'}")


def make_trainer(config: TrainingRecipe, root: Root) -> TorchTrainer:
    """The trainer of a run, on GPUs if `uses_gpus`; call it inside `ray_connection`."""
    gpus = uses_gpus(config.train)
    if not gpus:
        log.warning("the Ray cluster has no GPU: training on CPUs. On a cluster that starts nodes, set train.ranks")
    folder = f"{config.train.folder}/ray"
    storage = str(root.local_path(folder)) if root.is_local else root.at(folder)
    return TorchTrainer(
        partial(_run_rank, config, root, os.getcwd()),
        # Ray Train makes the process group, which DeepSpeed takes as it is.
        torch_config=TorchConfig(timeout_s=60 * config.train.timeout_minutes),
        scaling_config=ScalingConfig(num_workers=ranks_on_ray(config.train), use_gpu=gpus),
        run_config=RunConfig(
            name=config.train.name,
            storage_path=storage,
            # By default Ray tries to start ranks without a limit. mypy sees the class of an earlier Ray Train.
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=STARTS - 1),  # type: ignore[call-arg]
        ),
    )


def _run_rank(config: TrainingRecipe, root: Root, folder: str) -> None:
    """The work of one worker. folder: as for `prepare_process`."""
    prepare_process(folder)
    stage.run(config, root)


def _user_error(error: TrainingFailedError) -> UserError | None:
    """The UserError among the failures of a worker group; a NodeError only if there is no other."""
    failures = error.worker_failures.values() if isinstance(error, WorkerGroupError) else ()
    problems = [failure for failure in failures if isinstance(failure, UserError)]
    return min(problems, key=lambda problem: isinstance(problem, NodeError), default=None)
