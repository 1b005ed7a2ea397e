"""The progress of all stages of a recipe, from the files below its root.

Determines which stages a recipe has, and their numbers of shards from the manifests of earlier stages.
"""

from dataclasses import replace
from typing import Any

import numpy as np

from jobs.cli.recipe import Recipe
from jobs.status.inputs import changed_inputs
from jobs.status.training import training_status
from pipeline.pictures.near_copy_shards import pending_comparisons
from pipeline.recipe import EmbedConfig
from pipeline.runtime.status import StageSpec, Status, UpstreamStages, find_manifest, stage_status
from retrieval.config import Config
from retrieval.errors import UserError
from retrieval.storage.manifest import Manifest
from retrieval.storage.root import Root
from trainer.recipe import LatentsConfig, TrainConfig, TrainingRecipe

DATA_STAGES = ("filter", "download", "embed", "index", "neighbors", "latents")
RUN_STAGES = ("train", "sample", "evaluate")
"""Stages below `runs/<name>/`."""
UPSTREAM = {"download": "filter", "embed": "download", "latents": "embed", "neighbors": "index"}
"""The stage that decides how many shards a stage has."""


def statuses(recipe: Recipe, now: float) -> list[Status]:
    """The progress of every stage that the recipe has, in order. now: seconds since 1970.

    Raises UserError if the recipe's root does not exist.
    """
    root = recipe.root
    if not root.exists(""):
        raise UserError(
            f"{root.url} does not exist: no stage of {recipe.path} has run there. "
            f"Start with 'make filter RECIPE={recipe.path}', or name another folder: --set root=..."
        )
    upstream: UpstreamStages = {}
    stages = []
    for name in (*DATA_STAGES, *RUN_STAGES):
        if not recipe.has(name) or (name in RUN_STAGES and not recipe.has("train")):
            continue
        spec = _spec(recipe, name, upstream)
        manifest = find_manifest(root, spec.folder)
        status = _status(recipe, name, spec, manifest, (upstream, now))
        if name == "embed" and status.state == "stale" and (download := upstream.get("download", (status, None))[1]):
            pending = pending_comparisons(root, download, recipe[EmbedConfig].near_copy_bits)
            status = replace(status, note="; ".join(filter(None, (status.note, pending))))
        if name == "train":
            status = training_status(root, recipe[TrainConfig], status, now)
        stages.append(status)
        upstream[spec.name] = status, manifest
        if name == "index":
            upstream["database/index"] = upstream[name]  # its name in manifests of sample and evaluate
    return stages


def _status(
    recipe: Recipe, name: str, spec: StageSpec, manifest: Manifest | None, others: tuple[UpstreamStages, float]
) -> Status:
    """As `stage_status`, with the inputs that are no stages. others: its upstream and now."""
    note = ""
    try:
        spec = replace(spec, changed=changed_inputs(recipe, name, manifest) if manifest else "")
    except UserError as error:  # metadata may be deleted after filter
        note = f"whether its inputs changed is unknown: {error}"
    status = stage_status(recipe.root, spec, manifest, *others)
    return replace(status, note=note) if status.state == "finished" else status


def _spec(recipe: Recipe, name: str, upstream: UpstreamStages) -> StageSpec:
    """Folder, settings and number of shards of a stage."""
    config = recipe.sections[name]
    if name in RUN_STAGES:
        folder = f"runs/{recipe[TrainConfig].name}/{name}"
        return StageSpec(name, folder, _training_recipe(recipe) if name == "train" else config)
    folder = f"latents/{recipe[LatentsConfig].size}" if name == "latents" else name
    shards = _shards(name, upstream)
    return StageSpec(folder, folder, config, _totals(recipe.root, name, shards, upstream), shards)


def _training_recipe(recipe: Recipe) -> Config | None:
    """The sections in the fingerprint of a training run."""
    names = ("model", "diffusion", "autoencoder", "train")
    if not all(recipe.has(name) for name in names):
        return None
    sections: dict[str, Any] = {name: recipe.sections[name] for name in names}
    return TrainingRecipe.model_construct(**sections, clip=None)


def _source(name: str, upstream: UpstreamStages) -> Manifest | None:
    """The manifest of the stage that decides how many shards a stage has, if it is finished."""
    return upstream.get(UPSTREAM.get(name, ""), (None, None))[1]


def _shards(name: str, upstream: UpstreamStages) -> list[str]:
    """Names of the shards of a stage without phases, as far as its upstream stage is finished."""
    manifest = _source(name, upstream)
    if manifest is None or name == "neighbors":
        return []
    train = manifest.shard_names("train/")
    if name == "latents":
        return [shard.removeprefix("train/") for shard in train]
    return [*train, *manifest.shard_names("database/")]


def _totals(root: Root, name: str, shards: list[str], upstream: UpstreamStages) -> dict[str, int]:
    """Number of shards by phase, as far as the upstream stages are finished. shards: those of `_shards`."""
    if name == "index":
        return {"centroids": 1, "calibration": 1, **_partitions(root)}
    manifest = _source(name, upstream)
    if manifest is None:
        return {}
    if name == "neighbors":
        return {"match": len(manifest.values["rows"]), "recall": 1}
    return {"": len(shards)}


def _partitions(root: Root) -> dict[str, int]:
    """The number of partitions of an unfinished index, from its centroids; empty before they are written."""
    if not root.exists("index/centroids.npy"):
        return {}
    with root.open("index/centroids.npy") as file:
        np.lib.format.read_magic(file)
        shape, _, _ = np.lib.format.read_array_header_1_0(file)
    return {"partitions": shape[0]}
