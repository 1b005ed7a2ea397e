"""The plan of a training run: a recipe checked against the data, before any process group starts.

Reads the manifests of `neighbors` and of `latents/<size>` (or `download`), with aspect-ratio buckets also that of
`embed`. Errors name the difference to the recipe.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from retrieval.errors import UserError
from retrieval.storage import schema
from retrieval.storage.manifest import Manifest, files_exist, fingerprint, read_manifest, read_record
from retrieval.storage.root import Root
from retrieval.storage.schema import Reason
from trainer.data.aspect import Shape, bucket_shapes
from trainer.data.latents import latent_shape
from trainer.model.autoencoder import Autoencoder
from trainer.model.recipe import ContextNorm, ModelConfig
from trainer.recipe import TrainingRecipe


@dataclass(frozen=True)
class TrainingSet:
    """The training set: its shards, their rows, and the shape of a row."""

    source: str
    shards: tuple[str, ...]
    rows: tuple[int, ...]
    """Number of training rows of each shard: the first ones."""
    held_out: tuple[int, ...]
    """Number of held-out rows of each shard: the last ones."""
    unreadable: tuple[int, ...]
    """Number of images of each shard that have no latents because they could not be read."""
    k: int
    dim: int
    context_norm: ContextNorm
    latent_shape: tuple[int, int, int]
    views: int
    size: int
    flip: bool
    tables: tuple[str, ...]
    """Digest of the neighbor table of each shard."""
    aspect_step: int = 0

    @cached_property
    def shapes(self) -> tuple[Shape, ...]:
        """Height and width in pixels of the images of each aspect-ratio bucket; one square without buckets."""
        return bucket_shapes(self.size, self.aspect_step)

    @cached_property
    def latent_shapes(self) -> tuple[tuple[int, int, int], ...]:
        """(c, h, w) of the latents of each bucket."""
        channels, edge, _ = self.latent_shape
        shapes = self.shapes
        return tuple((channels, high * edge // self.size, wide * edge // self.size) for high, wide in shapes)


@dataclass(frozen=True)
class TrainingPlan:
    """A training run that matches its data."""

    config: TrainingRecipe
    training_set: TrainingSet
    fingerprint: str
    """Fingerprint of the finished run."""
    checkpoint_identity: str
    """Fingerprint of its checkpoints, which does not depend on the settings of CHANGEABLE."""
    upstream: dict[str, str]
    """Fingerprint of each input by name."""
    encoder: dict[str, Any]
    """Identity of the CLIP encoder of the neighbors."""
    autoencoder: str
    """Identity of the autoencoder."""


def make_plan(config: TrainingRecipe, root: Root, autoencoder: Autoencoder) -> TrainingPlan:
    """Check a recipe against the data. Raises UserError if they do not match."""
    train = config.train
    neighbors = read_manifest(root, "neighbors")
    _check_neighbors(neighbors, config, root)
    images = read_manifest(root, f"latents/{train.size}" if train.source == "latents" else "download")
    shape, views = _latent_shape(config, autoencoder), 1
    if train.source == "latents":
        views = int(images.values["views"])
        _check_latents(images, neighbors, autoencoder.identity, shape, root)
        _check_aspect(images, train.aspect_step, root)
    upstream = {"neighbors": neighbors.files_fingerprint, images.stage: images.fingerprint}
    upstream["autoencoder"] = autoencoder.identity
    if train.aspect_step:
        upstream["embed"] = _identity_of_sizes(root, [neighbors, images] if train.source == "latents" else [neighbors])
    if train.start_from:
        upstream["start_from"] = _initial_run(config, root, neighbors, autoencoder.identity).fingerprint
    unchanged = config.model_copy(update={"train": train.without_changeable()})
    return TrainingPlan(
        config=config,
        training_set=_training_set(config, neighbors, images, shape, views),
        fingerprint=fingerprint("train", schema.VERSION, config, upstream),
        checkpoint_identity=fingerprint("train", schema.VERSION, unchanged, upstream),
        upstream=upstream,
        encoder=neighbors.values["encoder"],
        autoencoder=autoencoder.identity,
    )


def is_finished(plan: TrainingPlan, root: Root) -> bool:
    """True if the folder has the manifest of this plan and all files that the manifest lists."""
    folder = plan.config.train.folder
    if not root.exists(f"{folder}/manifest.json"):
        return False
    manifest = read_manifest(root, folder)
    files_complete = all(files_exist(root, shard) for shard in manifest.shards)
    return manifest.fingerprint == plan.fingerprint and files_complete


def check_table(plan: TrainingPlan, root: Root, number: int) -> None:
    """Raise UserError if the neighbor table of a shard may have changed since the plan was made.

    Call it after the table was read: a removal of images deletes the record of a table before it replaces the table.
    """
    stored = read_record(root, "neighbors", plan.training_set.shards[number])
    if stored and stored[1].digest == plan.training_set.tables[number]:
        return
    manifest = root.find_json("neighbors/manifest.json")
    if manifest and manifest["values"].get("files_fingerprint", manifest["fingerprint"]) == plan.upstream["neighbors"]:
        return
    shard, folder = plan.training_set.shards[number], root.at(plan.config.train.folder)
    raise UserError(
        f"{root.at('neighbors')}: the table of shard {shard} has changed since the start of this training, by "
        f"'make optout' or 'make neighbors'. The checkpoints in {folder} belong to the former tables. When that "
        f"command is finished, train with another train.name, or with train.restart = true, which deletes them. To "
        f"start with their weights, import this folder ('make convert FROM=') and set train.start_from."
    )


def _initial_run(config: TrainingRecipe, root: Root, neighbors: Manifest, autoencoder: str) -> Manifest:
    """Manifest of the run of train.start_from. Raises UserError if its model, autoencoder or CLIP encoder differs."""
    folder = f"runs/{config.train.start_from}/train"
    manifest = read_manifest(root, folder)
    if (model := ModelConfig.model_validate(manifest.config["model"])) != config.model:
        raise UserError(
            f"{root.at(folder)} trained the model {model}, but the recipe has {config.model}. "
            f"Make [model] equal, or set train.start_from to another run."
        )
    inputs = {"autoencoder": autoencoder, "encoder": neighbors.values["encoder"]}
    for name, value in inputs.items():
        if (trained := manifest.values[name]) != value:
            raise UserError(
                f"{root.at(folder)} was trained with the {name} {trained}, the data of this recipe have {value}. Make "
                f"the data with that of the run, or set train.start_from to another run."
            )
    return manifest


def _training_set(
    config: TrainingRecipe, neighbors: Manifest, images: Manifest, latent_shape: tuple[int, int, int], views: int
) -> TrainingSet:
    unreadable = {shard.shard: shard.reasons.get(Reason.UNREADABLE, 0) for shard in images.shards}
    shards = [shard for shard in neighbors.shards if shard.rows]
    held_out = last_rows([shard.rows for shard in shards], config.train.validation_images)
    return TrainingSet(
        source=config.train.source,
        shards=tuple(shard.shard for shard in shards),
        rows=tuple(shard.rows - count for shard, count in zip(shards, held_out, strict=True)),
        held_out=held_out,
        unreadable=tuple(unreadable.get(shard.shard, 0) for shard in shards),
        k=config.train.k,
        dim=config.model.context_dim,
        context_norm=config.model.context_norm,
        latent_shape=latent_shape,
        views=views,
        size=config.train.size,
        flip=config.train.flip,
        tables=tuple(shard.digest for shard in shards),
        aspect_step=config.train.aspect_step,
    )


def last_rows(rows: list[int], count: int) -> tuple[int, ...]:
    """Number of rows of each shard among the last `count` rows of all shards. rows: those of each shard."""
    counts = []
    for shard_rows in reversed(rows):
        counts.append(min(count, shard_rows))
        count -= counts[-1]
    return tuple(reversed(counts))


def _latent_shape(config: TrainingRecipe, autoencoder: Autoencoder) -> tuple[int, int, int]:
    """Latent shape for train.size. Raises UserError if the size, the steps of buckets or the model do not match."""
    shape = latent_shape(config.train.size, autoencoder)
    multiple = autoencoder.factor * 2 ** (len(config.model.channels) - 1)
    if config.train.aspect_step % multiple:
        raise UserError(
            f"train.aspect_step must be a multiple of {multiple}, the factor of the autoencoder times that of the "
            f"network, got {config.train.aspect_step}."
        )
    bucket_shapes(config.train.size, config.train.aspect_step)
    if config.model.latent_channels != shape[0]:
        raise UserError(
            f"the autoencoder {config.autoencoder.path} gives latents of shape {shape}, but the recipe's model takes "
            f"{config.model.latent_channels} channels. Change model.latent_channels or autoencoder.path."
        )
    return shape


def _check_neighbors(neighbors: Manifest, config: TrainingRecipe, root: Root) -> None:
    where = root.at("neighbors")
    table = {"k": neighbors.values["k"], "dim": neighbors.values["encoder"]["dim"]}
    for name, value in (("k", config.train.k), ("dim", config.model.context_dim)):
        if table[name] != value:
            raise UserError(
                f"{where} has {name} {table[name]}, but the recipe has {value}. Set train.k and "
                f"model.context_dim to those of the table, or run 'make neighbors' with this recipe."
            )
    held_out = config.train.validation_images
    if neighbors.rows - held_out < config.train.global_batch:
        excluded = f", {held_out:,} of them held out" if held_out else ""
        raise UserError(
            f"{where} has {neighbors.rows:,} rows{excluded}: fewer training rows than one global batch of "
            f"{config.train.global_batch:,}. Lower train.global_batch or train.validation_images, or select more "
            f"images."
        )


def _check_aspect(latents: Manifest, step: int, root: Root) -> None:
    if (stored := latents.values.get("aspect_step", 0)) != step:
        raise UserError(
            f"{root.at(latents.stage)} has latents with aspect_step {stored}, but train.aspect_step is {step}. Make "
            f"[latents] and [train] equal, then run 'make latents'."
        )


def _identity_of_sizes(root: Root, stages: Sequence[Manifest]) -> str:
    """Identity of the training shards of `embed`, which have the sizes of the images.

    Raises UserError if one of the stages was made from other shards.
    """
    identity = read_manifest(root, "embed").identity_of("train/")
    for manifest in stages:
        if manifest.upstream.get("embed") != identity:
            command = manifest.stage.partition("/")[0]
            raise UserError(
                f"{root.at(manifest.stage)} was made from another output of embed than {root.at('embed')}, whose sizes "
                f"of images decide their aspect-ratio buckets. Run 'make {command}' again."
            )
    return identity


def _check_latents(
    latents: Manifest, neighbors: Manifest, autoencoder: str, shape: tuple[int, int, int], root: Root
) -> None:
    where = root.at(latents.stage)
    stored = (latents.values["autoencoder"], tuple(latents.values["shape"]))
    if stored != (autoencoder, shape):
        raise UserError(
            f"{where} has latents of autoencoder {stored[0]} and shape {stored[1]}, but the recipe has "
            f"{autoencoder} and {shape}. Run 'make latents' with this recipe."
        )
    rows = {shard.shard: shard.rows + shard.reasons.get(Reason.UNREADABLE, 0) for shard in latents.shards}
    for shard in neighbors.shards:
        if rows.get(shard.shard, 0) < shard.rows:
            raise UserError(
                f"{where} has {rows.get(shard.shard, 0)} rows for shard {shard.shard}, but neighbors has "
                f"{shard.rows}: the shards do not match. Run 'make latents' again."
            )
