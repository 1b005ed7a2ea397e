"""What a training run will do, decided from its recipe and the manifests before any process group starts.

Reads the manifests of `neighbors` and of `latents/<size>` (or `download`) and refuses, with a reason,
data that do not fit the recipe. Writes nothing.
"""

from dataclasses import dataclass
from typing import Any

from retrieval.errors import UserError
from retrieval.storage import schema
from retrieval.storage.manifest import Manifest, files_stand, fingerprint, read_manifest
from retrieval.storage.root import Root
from trainer.data.latents import latent_shape
from trainer.model.autoencoder import Autoencoder
from trainer.recipe import Training


@dataclass(frozen=True)
class Samples:
    """The training set: shards, their rows, and the layout of a row."""

    source: str
    shards: tuple[str, ...]
    rows: tuple[int, ...]
    """Rows of each shard that are trained on: the first ones."""
    held_out: tuple[int, ...]
    """Rows of each shard that follow these and are never trained on."""
    k: int
    dim: int
    latent_shape: tuple[int, int, int]
    views: int
    size: int
    flip: bool


@dataclass(frozen=True)
class Plan:
    """A training run that may start."""

    config: Training
    samples: Samples
    fingerprint: str
    """Of the finished run."""
    identity: str
    """Of its checkpoints: everything but the number of steps."""
    upstream: dict[str, str]
    encoder: dict[str, Any]
    autoencoder: str


def make_plan(config: Training, root: Root, autoencoder: Autoencoder) -> Plan:
    """Check a recipe against the data. Raises UserError where they do not fit."""
    train = config.train
    neighbors = read_manifest(root, "neighbors")
    _check_neighbors(neighbors, config, root)
    images = read_manifest(root, f"latents/{train.size}" if train.source == "latents" else "download")
    layout = _Layout(_latent_shape(config, autoencoder), 1)
    if train.source == "latents":
        layout = _Layout(layout.shape, int(images.values["views"]))
        _check_latents(images, neighbors, layout, autoencoder.identity, root)
    upstream = {
        "neighbors": neighbors.fingerprint,
        images.stage: images.fingerprint,
        "autoencoder": autoencoder.identity,
    }
    if train.start_from:
        upstream["start_from"] = _start_of(config, root).fingerprint
    # Nothing of a step depends on how many follow, so a checkpoint serves any number of them.
    endless = config.model_copy(update={"train": train.model_copy(update={"steps": 0})})
    return Plan(
        config=config,
        samples=_samples(config, neighbors, layout),
        fingerprint=fingerprint("train", schema.VERSION, config, upstream),
        identity=fingerprint("train", schema.VERSION, endless, upstream),
        upstream=upstream,
        encoder=neighbors.values["encoder"],
        autoencoder=autoencoder.identity,
    )


def is_finished(plan: Plan, root: Root) -> bool:
    """True if the run's manifest is there, is of this very run, and all its files stand."""
    folder = plan.config.train.folder
    if not root.exists(f"{folder}/manifest.json"):
        return False
    found = read_manifest(root, folder)
    return found.fingerprint == plan.fingerprint and all(files_stand(root, shard) for shard in found.shards)


def _start_of(config: Training, root: Root) -> Manifest:
    """The finished run that this one starts from. Raises UserError if its model is another."""
    folder = f"runs/{config.train.start_from}/train"
    start = read_manifest(root, folder)
    if start.config["model"] != config.model.model_dump(mode="json"):
        raise UserError(
            f"{root.at(folder)} trained the model {start.config['model']}, the recipe's is "
            f"{config.model.model_dump(mode='json')}. Set [model] to the same or train.start_from to another."
        )
    return start


@dataclass(frozen=True)
class _Layout:
    shape: tuple[int, int, int]
    views: int


def _samples(config: Training, neighbors: Manifest, layout: _Layout) -> Samples:
    filled = [shard for shard in neighbors.shards if shard.rows]
    held_out = last_rows([shard.rows for shard in filled], config.train.validation_images)
    return Samples(
        source=config.train.source,
        shards=tuple(shard.shard for shard in filled),
        rows=tuple(shard.rows - count for shard, count in zip(filled, held_out, strict=True)),
        held_out=held_out,
        k=config.train.k,
        dim=config.model.context_dim,
        latent_shape=layout.shape,
        views=layout.views,
        size=config.train.size,
        flip=config.train.flip,
    )


def last_rows(rows: list[int], count: int) -> tuple[int, ...]:
    """How many of the last `count` rows each shard has, shards one after the other."""
    taken = []
    for rows_here in reversed(rows):
        taken.append(min(count, rows_here))
        count -= taken[-1]
    return tuple(reversed(taken))


def _latent_shape(config: Training, autoencoder: Autoencoder) -> tuple[int, int, int]:
    """Shape of the latents of train.size. Raises UserError if the size or the model does not fit."""
    shape = latent_shape(config.train.size, autoencoder)
    if config.model.latent_channels != shape[0]:
        raise UserError(
            f"the autoencoder {config.autoencoder.path} makes latents of shape {shape}, but the recipe's "
            f"model takes {config.model.latent_channels} channels. "
            f"Set model.latent_channels or autoencoder.path."
        )
    return shape


def _check_neighbors(neighbors: Manifest, config: Training, root: Root) -> None:
    where = root.at("neighbors")
    found = {"k": neighbors.values["k"], "dim": neighbors.values["encoder"]["dim"]}
    for word, wanted in (("k", config.train.k), ("dim", config.model.context_dim)):
        if found[word] != wanted:
            raise UserError(
                f"{where} has {word} {found[word]}, but the recipe wants {wanted}. Set train.k "
                f"and model.context_dim to the table's, or run 'make neighbors' with the recipe's."
            )
    held_out = config.train.validation_images
    if neighbors.rows - held_out < config.train.global_batch:
        less = f" less {held_out:,} held out" if held_out else ""
        raise UserError(
            f"{where} has {neighbors.rows:,} rows{less}, fewer than one global batch of "
            f"{config.train.global_batch:,}. Lower train.global_batch or train.validation_images, or select "
            f"more images."
        )


def _check_latents(
    latents: Manifest, neighbors: Manifest, layout: _Layout, autoencoder: str, root: Root
) -> None:
    where = root.at(latents.stage)
    found = (latents.values["autoencoder"], tuple(latents.values["shape"]))
    if found != (autoencoder, layout.shape):
        raise UserError(
            f"{where} holds latents of autoencoder {found[0]} and shape {found[1]}, but the recipe's are "
            f"{autoencoder} and {layout.shape}. Run 'make latents' with this recipe."
        )
    rows = {shard.shard: shard.rows for shard in latents.shards}
    for shard in neighbors.shards:
        if rows.get(shard.shard, 0) < shard.rows:
            raise UserError(
                f"{where} has {rows.get(shard.shard, 0)} rows for shard {shard.shard} and neighbors has "
                f"{shard.rows}: the shards do not line up. Run 'make latents' again."
            )
