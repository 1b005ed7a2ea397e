"""What the demo's two small trainings, the CLIP and the autoencoder, share: drawn scenes and a schedule.

Reads and writes nothing. Both models see the picture world before the pipeline does, as the published CLIP
and autoencoder have seen the web; held-out contents stay unseen by both.
"""

import math
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from jobs.demo.world.content import Scene
from jobs.demo.world.scenes import draw, random_scene

SCENES_PER_CHUNK = 256
WARM_UP_SHARE = 0.1


def draw_training_scenes(
    num_scenes: int, side: int, seed: int, num_workers: int
) -> tuple[list[Scene], npt.NDArray[np.uint8]]:
    """Random scenes and their square pictures, (n, 3, side, side), never of a held-out content.

    The result depends on seed alone, whatever num_workers is.
    """
    chunks = [
        (seed, start, min(SCENES_PER_CHUNK, num_scenes - start), side)
        for start in range(0, num_scenes, SCENES_PER_CHUNK)
    ]
    # spawn: a fork of a process whose torch threads have started may hang
    with ProcessPoolExecutor(num_workers, mp_context=get_context("spawn")) as pool:
        drawn = list(tqdm(pool.map(_draw_chunk, chunks), total=len(chunks), desc="draw", unit="chunk"))
    return [scene for scenes, _ in drawn for scene in scenes], np.concatenate([pixels for _, pixels in drawn])


def _draw_chunk(chunk: tuple[int, int, int, int]) -> tuple[list[Scene], npt.NDArray[np.uint8]]:
    seed, start, size, side = chunk
    rng = np.random.default_rng([seed, start])
    scenes = [random_scene(rng) for _ in range(size)]
    return scenes, np.stack([draw(scene, side, side).transpose(2, 0, 1) for scene in scenes])


def warm_up_and_decay(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    """Raises the rates linearly over a tenth of the steps, then lowers them to 0 along a half cosine."""
    warm_up = max(1, round(WARM_UP_SHARE * steps))

    def share(step: int) -> float:
        if step < warm_up:
            return (step + 1) / (warm_up + 1)
        done = (step - warm_up) / max(1, steps - warm_up)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, share)
