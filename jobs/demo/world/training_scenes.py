"""Pictures of random scenes, on which the demo's models and its judge train.

Imports no torch, because each process that draws imports this module.
"""

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from jobs.demo.world.content import Scene
from jobs.demo.world.scenes import HELD_OUT_SHARE, draw, random_scene

SCENES_PER_CHUNK = 256


def draw_training_scenes(
    num_scenes: int, side: int, seed: int, num_workers: int, every_content: bool = False
) -> tuple[list[Scene], npt.NDArray[np.uint8]]:
    """Random scenes and their pictures (n, 3, side, side). num_workers changes no result.

    every_content: with held-out contents in their share; only the judge may see them.
    """
    chunks = [
        (seed, start, min(SCENES_PER_CHUNK, num_scenes - start), side, HELD_OUT_SHARE if every_content else 0.0)
        for start in range(0, num_scenes, SCENES_PER_CHUNK)
    ]
    # spawn: a fork may hang after torch has started threads
    with ProcessPoolExecutor(num_workers, mp_context=get_context("spawn")) as pool:
        draw_chunks = pool.map if num_workers > 1 else map  # one worker is this process; the pool then starts none
        results = list(tqdm(draw_chunks(_draw_chunk, chunks), total=len(chunks), desc="draw", unit="chunk"))
    return [scene for scenes, _ in results for scene in scenes], np.concatenate([pixels for _, pixels in results])


def _draw_chunk(chunk: tuple[int, int, int, int, float]) -> tuple[list[Scene], npt.NDArray[np.uint8]]:
    seed, start, size, side, held_out_share = chunk
    rng = np.random.default_rng([seed, start])
    scenes = [random_scene(rng, held_out=bool(rng.random() < held_out_share)) for _ in range(size)]
    return scenes, np.stack([draw(scene, side, side).transpose(2, 0, 1) for scene in scenes])
