"""Draws the parts of `sample` and `evaluate` in tasks on Ray, one for each GPU of the cluster.

A task loads the model, draws its part into the stage's folder and returns nothing. If its node is lost, Ray starts it
again, and finished batches are kept.
"""

import logging
import os
from collections.abc import Callable

import ray

from retrieval.cluster.connection import ray_connection
from retrieval.errors import UserError
from trainer.sampling.resumable import DrawPart, Part


def draw_on_ray(draw_part: Callable[[Part], None], tasks: int, log: logging.Logger, _: DrawPart) -> None:
    """Run `draw_part` for every part and wait. tasks: number of parts; 0: one for each GPU, at least one.

    log: of the stage. After Ray's retries for lost nodes, raises the UserError of a failed part, or for another
    exception Ray's error with the traceback of the task.
    """
    with ray_connection():
        gpus = int(ray.cluster_resources().get("GPU", 0))
        count = tasks or max(1, gpus)
        log.info(f"{log.name}: {count} parts on Ray")
        task = ray.remote(num_gpus=1 if gpus else 0, max_retries=3)(_draw_in_folder)
        try:
            ray.get([task.remote(draw_part, Part(number, count), os.getcwd()) for number in range(count)])
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, UserError):
                raise error.cause from None
            raise


def _draw_in_folder(draw_part: Callable[[Part], None], part: Part, folder: str) -> None:
    prepare_process(folder)
    draw_part(part)


def prepare_process(folder: str) -> None:
    """Start the log of a process of Ray, in the folder that paths in the recipe are relative to, if it is there."""
    if os.path.isdir(folder):
        os.chdir(folder)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s  %(name)s: %(message)s", force=True)
