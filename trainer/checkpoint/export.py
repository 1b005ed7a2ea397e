"""Exports a finished run: the averaged weights as a diffusers folder, the recipe and the manifest.

Writes `model/`, `recipe.json` and, last, `manifest.json` in the run's folder: all that sampling needs of the run.
"""

from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from retrieval.storage import schema
from retrieval.storage.manifest import Manifest, ShardRecord, write_manifest
from retrieval.storage.root import FileRecord, Root
from trainer.data.plan import TrainingPlan
from trainer.model.unet import build_unet
from trainer.recipe import ModelConfig, TrainingRecipe

CONFIG = "config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"


@dataclass(frozen=True)
class FinishedRun:
    """Description of a finished run for its recipe.json and manifest."""

    config: TrainingRecipe
    fingerprint: str
    upstream: dict[str, str]
    encoder: dict[str, Any]
    autoencoder: str
    latent_shape: tuple[int, int, int]
    rows: int = 0
    """Number of training images; 0 if unknown."""


def export_run(
    plan: TrainingPlan, root: Root, weights: dict[str, torch.Tensor], numbers: dict[str, float], seconds: float
) -> None:
    """Publish a trained model. weights: averaged, fp32, by name; numbers, seconds: as for `publish_run`."""
    run = FinishedRun(
        config=plan.config,
        fingerprint=plan.fingerprint,
        upstream=plan.upstream,
        encoder=plan.encoder,
        autoencoder=plan.autoencoder,
        latent_shape=plan.training_set.latent_shape,
        rows=sum(plan.training_set.rows),
    )
    publish_run(run, root, weights, numbers, seconds)


def publish_run(
    run: FinishedRun, root: Root, weights: dict[str, torch.Tensor], numbers: dict[str, float], seconds: float
) -> Manifest:
    """Publish a run. weights: fp32, by name, exactly those of the model; numbers: further values of the manifest;
    seconds: wall time of training.
    """
    folder = run.config.train.folder
    files = (*_write_model(root, f"{folder}/model", run.config.model, weights), _write_recipe(root, run))
    manifest = Manifest(
        stage=folder,
        schema_version=schema.VERSION,
        fingerprint=run.fingerprint,
        upstream=run.upstream,
        config=run.config.model_dump(mode="json"),
        shards=(ShardRecord("model", rows=run.rows, files=files),),
        values={
            **numbers,
            "encoder": run.encoder,
            "autoencoder": run.autoencoder,
            "latent_shape": list(run.latent_shape),
        },
        seconds=seconds,
    )
    write_manifest(root, manifest)
    return manifest


def _write_model(
    root: Root, folder: str, config: ModelConfig, weights: dict[str, torch.Tensor]
) -> tuple[FileRecord, ...]:
    # The meta device, so that the weights are in memory only once.
    with torch.device("meta"):
        unet: Any = build_unet(config)
    unet.load_state_dict(weights, strict=True, assign=True)
    # Always one file, because readers open it by name.
    with root.writing(f"{folder}/{WEIGHTS}") as pending:
        save_file(unet.state_dict(), pending.path, metadata={"format": "pt"})
        # safetensors creates files that only the owner can read.
        pending.path.chmod(0o644)
    description = root.write_bytes(f"{folder}/{CONFIG}", unet.to_json_string().encode())
    return description, pending.record


def read_model_weights(root: Root, folder: str) -> dict[str, torch.Tensor]:
    """Exported weights of a finished run by parameter name. folder: of the run, relative to the root."""
    with root.local(f"{folder}/model/{WEIGHTS}") as path:
        return load_file(path)


def _write_recipe(root: Root, run: FinishedRun) -> FileRecord:
    """The settings that sampling needs: model, diffusion, and identities of encoder and autoencoder."""
    config = run.config
    recipe = {
        "model": config.model.model_dump(mode="json"),
        "diffusion": config.diffusion.output_fields(),
        "autoencoder": config.autoencoder.model_dump(mode="json"),
        "autoencoder_identity": run.autoencoder,
        "encoder": run.encoder,
        "latent_shape": list(run.latent_shape),
        "size": config.train.size,
        "k": config.train.k,
    }
    return root.write_json(f"{config.train.folder}/recipe.json", recipe)
