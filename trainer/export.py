"""The finished run: averaged weights as a diffusers folder, the recipe beside them, the manifest last.

Writes `model/config.json`, `model/diffusion_pytorch_model.safetensors`, `recipe.json` and
`manifest.json` in the run's folder. Whoever samples needs nothing else of the training.
"""

import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from retrieval import schema
from retrieval.manifest import Manifest, ShardRecord, write_manifest
from retrieval.storage import FileRecord, Root
from trainer.model import ModelConfig, build_unet
from trainer.plan import Plan
from trainer.progress import METRICS, read_points, summary

WEIGHTS = "diffusion_pytorch_model.safetensors"


def export(plan: Plan, root: Root, weights: dict[str, torch.Tensor], seconds: float) -> None:
    """Publish fp32 weights (by parameter name) and the manifest of a run. `seconds`: what it took."""
    train = plan.config.train
    model_files = _write_model(root, f"{train.folder}/model", plan.config.model, weights)
    files = (*model_files, _write_recipe(root, plan))
    points = read_points(root.local_path(f"{train.folder}/{METRICS}"))
    values = {
        **summary(points, train.global_batch),
        "encoder": plan.encoder,
        "autoencoder": plan.autoencoder,
        "latent_shape": list(plan.samples.latent_shape),
    }
    manifest = Manifest(
        stage=train.folder,
        schema_version=schema.VERSION,
        fingerprint=plan.fingerprint,
        upstream=plan.upstream,
        config=plan.config.model_dump(mode="json"),
        shards=(ShardRecord("model", rows=sum(plan.samples.rows), files=files),),
        values=values,
        seconds=seconds,
    )
    write_manifest(root, manifest)


def _write_model(
    root: Root, folder: str, config: ModelConfig, weights: dict[str, torch.Tensor]
) -> tuple[FileRecord, ...]:
    unet: Any = build_unet(config)
    unet.load_state_dict(weights, strict=True)
    records = []
    with tempfile.TemporaryDirectory(prefix="rdm-") as scratch:
        # One file, whatever the size: readers look for it by name.
        unet.save_pretrained(scratch, safe_serialization=True, max_shard_size="1TB")
        for path in sorted(Path(scratch).iterdir()):
            with root.writing(f"{folder}/{path.name}") as pending:
                shutil.copyfile(path, pending.path)
            records.append(pending.record)
    return tuple(records)


def read_model(root: Root, folder: str) -> dict[str, torch.Tensor]:
    """The exported weights of a finished run, by parameter name. folder: the run's, relative to the root."""
    with root.local(f"{folder}/model/{WEIGHTS}") as path:
        return load_file(path)


def _write_recipe(root: Root, plan: Plan) -> FileRecord:
    """What a sampler must know: the settings of the model, and which encoder and autoencoder it goes with."""
    recipe = {
        "model": plan.config.model.model_dump(mode="json"),
        "diffusion": plan.config.diffusion.model_dump(mode="json"),
        "autoencoder": plan.config.autoencoder.model_dump(mode="json"),
        "autoencoder_identity": plan.autoencoder,
        "encoder": plan.encoder,
        "latent_shape": list(plan.samples.latent_shape),
        "size": plan.config.train.size,
        "k": plan.config.train.k,
    }
    return root.write_json(f"{plan.config.train.folder}/recipe.json", recipe)
