"""Small training sets on disk, and recipes that fit them."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from retrieval import schema
from retrieval.manifest import Manifest, ShardRecord, write_manifest
from retrieval.storage import Root
from trainer.recipe import Training

DIM, K, VIEWS, SHAPE = 32, 4, 2, (4, 8, 8)


def write_stage(root: Root, stage: str, rows: dict[str, int], values: dict[str, object]) -> None:
    shards = tuple(ShardRecord(name, count, ()) for name, count in rows.items())
    write_manifest(root, Manifest(stage, schema.VERSION, f"print of {stage}", {}, {}, shards, values, 0.0))


def ids_of(shard: int, rows: int) -> np.ndarray:
    # High bits set, so that ids are negative as half of all real ones are.
    return np.arange(rows, dtype=np.int64) + 1000 * shard - (1 << 62)


@pytest.fixture(scope="session")
def write_training_set() -> Callable[[Root, list[int], str], None]:
    """Writes neighbors and latents of shards with given rows. Images are blobs whose place the neighbors tell."""

    def write(root: Root, rows: list[int], autoencoder: str) -> None:
        names = {f"{number:05d}-{len(rows):05d}": count for number, count in enumerate(rows)}
        for number, (name, count) in enumerate(names.items()):
            rng = np.random.default_rng([7, number])
            ids = ids_of(number, count)
            context = rng.standard_normal((count, K, DIM)).astype(np.float16)
            moments = np.zeros((count, VIEWS, 2, *SHAPE), np.float16)
            moments[:, :, 0] = context.mean(axis=(1, 2))[:, None, None, None, None] * 10
            moments[:, :, 1] = 0.1
            table = pa.table(
                [ids, schema.fixed_lists(np.zeros((count, K), np.int64))]
                + [
                    schema.fixed_lists(np.ones((count, K), np.float32)),
                    schema.fixed_lists(context.reshape(count, K * DIM)),
                ],
                schema=schema.neighbors(K, DIM),
            )
            schema.write_table(root, f"neighbors/{name}.parquet", table, schema.neighbors(K, DIM))
            # One image more than neighbors has, and first: the join is by id.
            flat = moments.reshape(count, VIEWS * 2 * int(np.prod(SHAPE)))
            wide = schema.latents(flat.shape[1])
            latents = pa.table(
                [np.append(ids[:1] - 1, ids), schema.fixed_lists(np.append(flat[:1], flat, axis=0))],
                schema=wide,
            )
            schema.write_table(root, f"latents/64/{name}.parquet", latents, wide)
        identity = {"model": "test", "weights": "0" * 16, "preprocessing": "{}", "dim": DIM}
        write_stage(root, "neighbors", names, {"k": K, "dim": DIM, "encoder": identity})
        more = {name: count + 1 for name, count in names.items()}
        write_stage(
            root, "latents/64", more, {"autoencoder": autoencoder, "shape": list(SHAPE), "views": VIEWS}
        )

    return write


def recipe(**train: object) -> Training:
    """A recipe that fits the training set; keywords change section `train`."""
    settings = {
        "name": "tiny",
        "source": "latents",
        "size": 64,
        "k": K,
        "global_batch": 8,
        "micro_batch": 2,
        "lanes": 4,
    }
    settings |= {"steps": 6, "learning_rate": 1e-3, "warmup_steps": 2, "precision": "fp32", "ema_decay": 0.9}
    settings |= {"log_every": 1, "checkpoint_every": 2, "seed": 3}
    model = {"latent_channels": 4, "context_dim": DIM, "channels": [32, 64], "attention": [2]}
    sections = {
        "model": {**model, "layers": 1},
        "diffusion": {},
        "autoencoder": AUTOENCODER,
        "train": settings | train,
    }
    return Training.model_validate(sections)
