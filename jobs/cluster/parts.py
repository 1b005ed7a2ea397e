"""Divides the pictures of `sample` and `evaluate` among processes: the ranks of torchrun, or tasks on Ray.

Each process draws its part of the batches or groups into the stage's folder, which all must see. The parts depend only
on the requests, so on equal machines any number of processes writes the same pictures. One process writes the manifest.
"""

import logging
import os
from datetime import timedelta
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist

from retrieval.storage.root import Root
from trainer.sampling.resumable import Distribute, DrawPart, Part, draw_alone
from trainer.sampling.sampler import TrainedModel

LONGEST_WAIT = timedelta(days=7)
"""Ranks that are done wait for the others."""


class Stage(Protocol):
    """The modules `trainer.sampling.sample` and `trainer.evaluation.evaluate`."""

    log: logging.Logger

    def run(self, config: Any, trained: TrainedModel, root: Root, distribute: Distribute = draw_alone) -> object:
        """The whole stage."""

    def draw_part(self, config: Any, trained: TrainedModel, root: Root, part: Part) -> None:
        """A part of a stage that `run` has begun in another process."""


def run_in_parts(stage: Stage, config: Any, trained: TrainedModel, root: Root, ray_tasks: int | None) -> None:
    """Run the stage in tasks on Ray (None: not on Ray), as a rank of torchrun, or alone."""
    if ray_tasks is not None:
        # Only this branch needs Ray.
        from jobs.cluster.ray_parts import draw_on_ray

        draw_part = partial(stage.draw_part, config, trained, root)
        stage.run(config, trained, root, partial(draw_on_ray, draw_part, ray_tasks, stage.log))
    elif "RANK" in os.environ:
        _run_rank(stage, _on_own_gpu(config), trained, root)
    else:
        stage.run(config, trained, root)


def _on_own_gpu(config: Any) -> Any:
    """The configuration with the GPU of this rank."""
    if config.device not in ("auto", "cuda") or not torch.cuda.is_available():
        return config
    return config.model_copy(update={"device": f"cuda:{os.environ['LOCAL_RANK']}"})


def _run_rank(stage: Stage, config: Any, trained: TrainedModel, root: Root) -> None:
    dist.init_process_group("gloo", timeout=LONGEST_WAIT)
    try:
        if dist.get_rank() == 0:
            announced: list[bool] = []
            stage.run(config, trained, root, partial(_draw_with_others, announced))
            if not announced:
                _broadcast(False)
        elif _broadcast(False):
            stage.draw_part(config, trained, root, Part(dist.get_rank(), dist.get_world_size()))
            dist.barrier()
    finally:
        dist.destroy_process_group()


def _draw_with_others(announced: list[bool], draw: DrawPart) -> None:
    """Rank 0: let the other ranks begin, draw its own part, and wait for them."""
    announced.append(_broadcast(True))
    draw(Part(0, dist.get_world_size()))
    dist.barrier()


def _broadcast(value: bool) -> bool:
    """The value of rank 0."""
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]
