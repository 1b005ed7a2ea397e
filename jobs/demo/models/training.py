"""Shared by the training of the demo's CLIP and autoencoder: training scenes, precision, learning rates.

Both models train on scenes of the demo world, but never on held-out contents.
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
from retrieval.index.precision import has_bfloat16

SCENES_PER_CHUNK = 256
WARM_UP_SHARE = 0.1


def draw_training_scenes(
    num_scenes: int, side: int, seed: int, num_workers: int
) -> tuple[list[Scene], npt.NDArray[np.uint8]]:
    """Random scenes without held-out contents, and their pictures (n, 3, side, side). num_workers changes no result."""
    chunks = [
        (seed, start, min(SCENES_PER_CHUNK, num_scenes - start), side)
        for start in range(0, num_scenes, SCENES_PER_CHUNK)
    ]
    # spawn: a fork may hang after torch has started threads
    with ProcessPoolExecutor(num_workers, mp_context=get_context("spawn")) as pool:
        results = list(tqdm(pool.map(_draw_chunk, chunks), total=len(chunks), desc="draw", unit="chunk"))
    return [scene for scenes, _ in results for scene in scenes], np.concatenate([pixels for _, pixels in results])


def _draw_chunk(chunk: tuple[int, int, int, int]) -> tuple[list[Scene], npt.NDArray[np.uint8]]:
    seed, start, size, side = chunk
    rng = np.random.default_rng([seed, start])
    scenes = [random_scene(rng) for _ in range(size)]
    return scenes, np.stack([draw(scene, side, side).transpose(2, 0, 1) for scene in scenes])


def bfloat16_autocast() -> torch.autocast:
    """bfloat16 matrix products, if the CPU has instructions for them: without, they are 130 times slower."""
    return torch.autocast("cpu", torch.bfloat16, enabled=has_bfloat16(torch.device("cpu")))


def warm_up_and_decay(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    """Learning rates that rise linearly over a tenth of the steps, then fall to 0 along a half cosine."""
    warm_up = max(1, round(WARM_UP_SHARE * steps))

    def factor(step: int) -> float:
        if step < warm_up:
            return (step + 1) / (warm_up + 1)
        progress = (step - warm_up) / max(1, steps - warm_up)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
