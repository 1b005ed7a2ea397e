"""The finished run: averaged weights as a diffusers folder, the recipe beside them, the manifest last.

Writes `model/config.json`, `model/diffusion_pytorch_model.safetensors`, `recipe.json` and
`manifest.json` in the run's folder. Whoever samples needs nothing else of the training.
"""

from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from retrieval.storage import schema
from retrieval.storage.manifest import Manifest, ShardRecord, write_manifest
from retrieval.storage.root import FileRecord, Root
from trainer.data.plan import Plan
from trainer.model.unet import build_unet
from trainer.recipe import ModelConfig, Training
from trainer.tracking.progress import METRICS, read_points, summary

CONFIG = "config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"


@dataclass(frozen=True)
class Run:
    """A finished run: what it was made from and what it goes with."""

    config: Training
    fingerprint: str
    upstream: dict[str, str]
    encoder: dict[str, Any]
    autoencoder: str
    latent_shape: tuple[int, int, int]
    rows: int = 0
    """Images that it was trained on, where that is known."""


def export(plan: Plan, root: Root, weights: dict[str, torch.Tensor], seconds: float) -> None:
    """Publish what training left: fp32 weights by parameter name. `seconds`: what it took."""
    train = plan.config.train
    run = Run(
        config=plan.config,
        fingerprint=plan.fingerprint,
        upstream=plan.upstream,
        encoder=plan.encoder,
        autoencoder=plan.autoencoder,
        latent_shape=plan.samples.latent_shape,
        rows=sum(plan.samples.rows),
    )
    points = read_points(root.local_path(f"{train.folder}/{METRICS}"))
    publish(run, root, weights, summary(points, train.global_batch), seconds)


def publish(
    run: Run, root: Root, weights: dict[str, torch.Tensor], numbers: dict[str, float], seconds: float
) -> Manifest:
    """Write the model, the recipe and last the manifest of a run. `numbers`: what the manifest also states.

    weights: fp32, by parameter name; every one of the model and no other.
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
    # On no device, so that the weights are held once.
    with torch.device("meta"):
        unet: Any = build_unet(config)
    unet.load_state_dict(weights, strict=True, assign=True)
    # One file, whatever the size: readers look for it by name.
    with root.writing(f"{folder}/{WEIGHTS}") as pending:
        save_file(unet.state_dict(), pending.path, metadata={"format": "pt"})
        # safetensors lets nobody else read
        pending.path.chmod(0o644)
    description = root.write_bytes(f"{folder}/{CONFIG}", unet.to_json_string().encode())
    return description, pending.record


def read_model(root: Root, folder: str) -> dict[str, torch.Tensor]:
    """The exported weights of a finished run, by parameter name. folder: the run's, relative to the root."""
    with root.local(f"{folder}/model/{WEIGHTS}") as path:
        return load_file(path)


def _write_recipe(root: Root, run: Run) -> FileRecord:
    """What a sampler must know: the settings of the model, and which encoder and autoencoder it goes with."""
    config = run.config
    recipe = {
        "model": config.model.model_dump(mode="json"),
        "diffusion": config.diffusion.model_dump(mode="json"),
        "autoencoder": config.autoencoder.model_dump(mode="json"),
        "autoencoder_identity": run.autoencoder,
        "encoder": run.encoder,
        "latent_shape": list(run.latent_shape),
        "size": config.train.size,
        "k": config.train.k,
    }
    return root.write_json(f"{config.train.folder}/recipe.json", recipe)
