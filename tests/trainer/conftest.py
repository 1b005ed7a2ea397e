"""A small training set on disk, and recipes that fit it."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
import torch
from diffusers import AutoencoderKL

from retrieval import schema
from retrieval.manifest import Manifest, ShardRecord, write_manifest
from retrieval.storage import Root
from trainer.autoencoder import Autoencoder
from trainer.recipe import Training

DIM, K, VIEWS, SHAPE = 32, 4, 2, (4, 8, 8)
ROWS = (30, 0, 17, 25)


@pytest.fixture(scope="session")
def autoencoder_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An untrained KL autoencoder of factor 8 with 4 channels, in diffusers' layout."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("autoencoder")
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    widths = {"block_out_channels": (8, 8, 8, 8), "latent_channels": 4, "norm_num_groups": 4}
    AutoencoderKL(layers_per_block=1, **blocks, **widths).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def recipe(autoencoder_folder: str) -> Callable[..., Training]:
    """Makes a recipe that fits the training set; keywords change section `train`."""

    def make(**changes: object) -> Training:
        train = {"name": "tiny", "source": "latents", "size": 64, "k": K, "steps": 6, "seed": 3}
        train |= {"global_batch": 8, "micro_batch": 2, "lanes": 4, "learning_rate": 1e-3, "warmup_steps": 2}
        train |= {"precision": "fp32", "ema_decay": 0.9, "log_every": 1, "checkpoint_every": 2}
        model = {"latent_channels": 4, "context_dim": DIM, "channels": [32, 64], "attention": [2], "layers": 1}
        autoencoder = {"kind": "kl", "path": autoencoder_folder, "scale": 1.0}
        sections = {"model": model, "diffusion": {}, "autoencoder": autoencoder, "train": train | changes}
        return Training.model_validate(sections)

    return make


@pytest.fixture
def training_set(tmp_path_factory: pytest.TempPathFactory, recipe: Callable[..., Training]) -> Root:
    """Neighbors and latents of shards with ROWS rows; the context tells a latent's mean, the view its deviation."""
    root = Root(tmp_path_factory.mktemp("root"))
    names = {f"{number:05d}-{len(ROWS):05d}": count for number, count in enumerate(ROWS)}
    for number, (name, count) in enumerate(names.items()):
        rng = np.random.default_rng([7, number])
        ids = ids_of(number, count)
        context = rng.standard_normal((count, K, DIM)).astype(np.float16)
        write_neighbors(root, name, ids, context)
        moments = np.empty((count, VIEWS, 2, *SHAPE), np.float16)
        moments[:, :, 0] = 5 * context.mean(axis=(1, 2))[:, None, None, None, None]
        moments[:, :, 1] = (0.1 * np.arange(1, VIEWS + 1))[:, None, None, None]
        write_latents(root, name, ids, moments)
    identity = {"model": "test", "weights": "0" * 16, "preprocessing": "{}", "dim": DIM}
    write_stage(root, "neighbors", names, {"k": K, "encoder": identity})
    autoencoder = Autoencoder.load(recipe().autoencoder, "cpu").identity
    more = {name: count + 1 for name, count in names.items()}
    write_stage(root, "latents/64", more, {"autoencoder": autoencoder, "shape": list(SHAPE), "views": VIEWS})
    return root


def ids_of(shard: int, rows: int) -> npt.NDArray[np.int64]:
    """Negative, as half of all real ids are."""
    return np.arange(rows, dtype=np.int64) + 1000 * shard - (1 << 62)


def write_neighbors(
    root: Root, name: str, ids: npt.NDArray[np.int64], context: npt.NDArray[np.float16]
) -> None:
    count = len(ids)
    columns = [np.zeros((count, K), np.int64), np.ones((count, K), np.float32), context.reshape(count, K * DIM)]
    wanted = schema.neighbors(K, DIM)
    table = pa.table([pa.array(ids), *map(schema.fixed_lists, columns)], schema=wanted)
    schema.write_table(root, f"neighbors/{name}.parquet", table, wanted)


def write_latents(
    root: Root, name: str, ids: npt.NDArray[np.int64], moments: npt.NDArray[np.float16]
) -> None:
    """One image more than neighbors has stands first: the join is by id, not by row."""
    length = VIEWS * 2 * int(np.prod(SHAPE))
    flat = np.concatenate([np.zeros((1, length), np.float16), moments.reshape(len(ids), length)])
    wanted = schema.latents(length)
    table = pa.table([pa.array([12345, *ids.tolist()]), schema.fixed_lists(flat)], schema=wanted)
    schema.write_table(root, f"latents/64/{name}.parquet", table, wanted)


def write_stage(root: Root, stage: str, rows: dict[str, int], values: dict[str, object]) -> None:
    shards = tuple(ShardRecord(name, count, ()) for name, count in rows.items())
    write_manifest(root, Manifest(stage, schema.VERSION, f"print of {stage}", {}, {}, shards, values, 0.0))
