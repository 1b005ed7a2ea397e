"""A small training set on disk and a recipe for it. The mean of a latent is 5 times that of its neighbors."""

import io
import tarfile
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image

from retrieval.storage import schema
from retrieval.storage.manifest import Manifest, ShardRecord, write_manifest
from retrieval.storage.root import Root
from trainer.data.plan import TrainingPlan, make_plan
from trainer.model.autoencoder import Autoencoder
from trainer.recipe import TrainingRecipe

DIM, K, VIEWS, SHAPE = 32, 4, 2, (4, 8, 8)
ROWS = (30, 0, 17, 25)
NAMES = tuple(f"{number:05d}-{len(ROWS):05d}" for number in range(len(ROWS)))


def make_recipe(autoencoder_folder: str, **changes: object) -> TrainingRecipe:
    """A recipe for the training set. changes: settings of section `train`."""
    train = {"name": "tiny", "source": "latents", "size": 64, "k": K, "steps": 6, "seed": 3}
    train |= {"global_batch": 8, "micro_batch": 2, "interleaved_shards": 4, "learning_rate": 1e-3, "warmup_steps": 2}
    train |= {"precision": "fp32", "ema_decay": 0.9, "log_every": 1, "checkpoint_every": 2}
    model = {"latent_channels": 4, "context_dim": DIM, "channels": [32, 64], "attention": [2], "layers": 1}
    autoencoder = {"kind": "kl", "path": autoencoder_folder, "scale": 1.0}
    sections = {"model": model, "diffusion": {}, "autoencoder": autoencoder, "train": train | changes}
    return TrainingRecipe.model_validate(sections)


def plan_of(autoencoder_folder: str, root: Root, **changes: object) -> TrainingPlan:
    """The plan of a recipe by `make_recipe`."""
    recipe = make_recipe(autoencoder_folder, **changes)
    return make_plan(recipe, root, Autoencoder.load(recipe.autoencoder, "cpu"))


def write_tar(root: Root, shard: str, members: dict[str, bytes]) -> None:
    """Write a shard's tar below `download/train`. members: contents by file name."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    root.write_bytes(f"download/train/{shard}.tar", buffer.getvalue())


def png(image: Image.Image) -> bytes:
    """An image in PNG format."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def new_training_set(folder: Path, autoencoder_folder: str) -> Root:
    """A root in this folder with neighbors and latents."""
    root = Root(folder)
    autoencoder = Autoencoder.load(make_recipe(autoencoder_folder).autoencoder, "cpu")
    write_training_set(root, autoencoder.identity)
    return root


def write_training_set(root: Root, autoencoder: str) -> None:
    """Neighbors and latents of shards with ROWS rows. autoencoder: identity for the manifest."""
    for number, (name, count) in enumerate(zip(NAMES, ROWS, strict=True)):
        context = np.random.default_rng([7, number]).standard_normal((count, K, DIM)).astype(np.float16)
        write_neighbors(root, name, ids_of(number), context)
        moments = np.empty((count, VIEWS, 2, *SHAPE), np.float16)
        moments[:, :, 0] = 5 * context.mean(axis=(1, 2))[:, None, None, None, None]
        moments[:, :, 1] = (0.1 * np.arange(1, VIEWS + 1))[:, None, None, None]
        write_latents(root, name, ids_of(number), moments)
    rows = dict(zip(NAMES, ROWS, strict=True))
    encoder = {"model": "test", "weights": "0" * 16, "preprocessing": "{}", "dim": DIM}
    write_stage(root, "neighbors", rows, {"k": K, "encoder": encoder})
    latent_rows = {name: count + 1 for name, count in rows.items()}
    write_stage(root, "latents/64", latent_rows, {"autoencoder": autoencoder, "shape": list(SHAPE), "views": VIEWS})


def ids_of(shard: int) -> npt.NDArray[np.int64]:
    """Image ids of a shard; negative, like half of all real ids."""
    return np.arange(ROWS[shard], dtype=np.int64) + 1000 * shard - (1 << 62)


def all_ids() -> list[int]:
    """Image ids of the training set, in order."""
    return [int(image_id) for shard in range(len(ROWS)) for image_id in ids_of(shard)]


def write_neighbors(
    root: Root,
    name: str,
    ids: npt.NDArray[np.int64],
    context: npt.NDArray[np.float16],
    norms: npt.NDArray[np.float32] | None = None,
) -> None:
    """One shard of neighbors. Training reads only ids, embeddings and lengths (all 1 by default)."""
    count = len(ids)
    ones = np.ones((count, K), np.float32)
    columns = [np.zeros((count, K), np.int64), ones, context.reshape(count, K * DIM), ones if norms is None else norms]
    layout = schema.neighbors(K, DIM)
    table = pa.table([pa.array(ids), *map(schema.fixed_lists, columns)], schema=layout)
    schema.write_table(root, f"neighbors/{name}.parquet", table, layout)


def write_latents(root: Root, name: str, ids: npt.NDArray[np.int64], moments: npt.NDArray[np.float16]) -> None:
    """One shard of latents. Its first image is not in the neighbors table, to test that rows join by id."""
    length = VIEWS * 2 * int(np.prod(SHAPE))
    flat = np.concatenate([np.zeros((1, length), np.float16), moments.reshape(len(ids), length)])
    layout = schema.latents(length)
    table = pa.table([pa.array([12345, *ids.tolist()]), schema.fixed_lists(flat)], schema=layout)
    schema.write_table(root, f"latents/64/{name}.parquet", table, layout)


def write_stage(root: Root, stage: str, rows: dict[str, int], values: dict[str, object]) -> None:
    """Write the manifest of a stage."""
    shards = tuple(ShardRecord(name, count, ()) for name, count in rows.items())
    write_manifest(root, Manifest(stage, schema.VERSION, f"print of {stage}", {}, {}, shards, values, 0.0))


def write_tars(root: Root) -> None:
    """A tar for each shard: color gradients of 96 x 80 pixels; the green channel identifies the image."""
    for number, name in enumerate(NAMES):
        members = {}
        for row, image_id in enumerate(ids_of(number).tolist()):
            pixels = np.zeros((80, 96, 3), np.uint8)
            pixels[..., 0] = np.arange(96) * 2
            pixels[..., 1] = 40 * number + row
            members[f"{image_id & (2**64 - 1):016x}.jpg"] = png(Image.fromarray(pixels))
        write_tar(root, name, members)
    write_stage(root, "download", {}, {})
