"""Exports a finished run: the averaged weights as a diffusers folder, the recipe and the manifest.

Writes `model/`, `recipe.json` and, last, `manifest.json` in the run's folder: all that sampling needs of the run. With
`train.lora` the model has the adapters merged, and `adapter/` has them alone in peft's layout.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from retrieval.errors import UserError
from retrieval.storage import schema
from retrieval.storage.manifest import Manifest, ShardRecord, read_manifest, write_manifest
from retrieval.storage.root import FileRecord, Root
from trainer.data.plan import TrainingPlan
from trainer.model.lora import merge, peft_files
from trainer.model.recipe import LoraConfig, ModelConfig
from trainer.model.unet import build_unet
from trainer.recipe import TrainingRecipe

CONFIG = "config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
ADAPTER = "adapter"
"""Folder of the adapters of `train.lora`, in peft's layout."""


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
    adapters: dict[str, torch.Tensor] = field(default_factory=dict)
    """Averaged adapters of `train.lora`, by name."""


def export_run(
    plan: TrainingPlan, root: Root, weights: dict[str, torch.Tensor], numbers: dict[str, float], seconds: float
) -> None:
    """Publish a trained model. weights: averaged, fp32, by name; numbers, seconds: as for `publish_run`.

    With `train.lora`, weights are those of the adapters. Raises UserError if `train.start_from` has changed meanwhile.
    """
    train, adapters = plan.config.train, {}
    if train.lora:
        start = f"runs/{train.start_from}/train"
        if read_manifest(root, start).fingerprint != plan.upstream["start_from"]:
            raise UserError(
                f"{root.at(start)} is another run than the one that the adapters were trained on. Restore that run, "
                f"then start again: the checkpoint of the last step is kept."
            )
        adapters = weights
        weights = merge(read_model_weights(root, start), adapters, train.lora)
    run = FinishedRun(
        config=plan.config,
        fingerprint=plan.fingerprint,
        upstream=plan.upstream,
        encoder=plan.encoder,
        autoencoder=plan.autoencoder,
        latent_shape=plan.training_set.latent_shape,
        rows=sum(plan.training_set.rows),
        adapters=adapters,
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
    if run.config.train.lora:
        files = (*files, *_write_adapters(root, f"{folder}/{ADAPTER}", run.adapters, run.config.train.lora))
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
    stored = _write_tensors(root, f"{folder}/{WEIGHTS}", unet.state_dict())
    return root.write_bytes(f"{folder}/{CONFIG}", unet.to_json_string().encode()), stored


def _write_adapters(
    root: Root, folder: str, adapters: dict[str, torch.Tensor], lora: LoraConfig
) -> tuple[FileRecord, ...]:
    config, tensors = peft_files(adapters, lora)
    stored = _write_tensors(root, f"{folder}/adapter_model.safetensors", tensors)
    return root.write_json(f"{folder}/adapter_config.json", config), stored


def _write_tensors(root: Root, name: str, tensors: dict[str, torch.Tensor]) -> FileRecord:
    with root.writing(name) as pending:
        save_file(tensors, pending.path, metadata={"format": "pt"})
        # safetensors creates files that only the owner can read.
        pending.path.chmod(0o644)
    return pending.record


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
