"""Writes and reads models as diffusers folders: networks, scheduler, `model_index.json`, `pipeline.py`, a model card.

diffusers opens such a folder without this project. Folders of other projects can be read too.
"""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from retrieval.errors import UserError
from retrieval.storage.manifest import Manifest, read_manifest
from retrieval.storage.root import Root
from trainer.checkpoint.export import CONFIG, WEIGHTS
from trainer.model.autoencoder import Autoencoder
from trainer.model.diffusion import scheduler_settings
from trainer.model.recipe import AutoencoderConfig, ContextNorm, DiffusionConfig, ModelConfig
from trainer.model.unet import build_unet
from trainer.recipe import TrainingRecipe
from trainer.released.checkpoint_import import ReleasedModel, safetensors_errors

LENGTHS = {"unit": "each of length 1", "raw": "with the lengths that CLIP gives them, not normalized"}
SCHEDULER = "scheduler/scheduler_config.json"
PIPELINE = Path(__file__).with_name("pipeline.py")
CARD = """---
library_name: diffusers
tags: [retrieval-augmented, latent-diffusion]
---
# {name}

A retrieval-augmented latent diffusion model: its cross-attention takes CLIP vectors of neighbors.

- UNet: {parameters:,} parameters, trained at {size} px ({shape} latents) with {k} neighbors.
- Encoder of the vectors: {encoder}, dimension {dim}.
- Autoencoder: {autoencoder}; latents are multiplied by {scale}.
- Inputs: {upstream}.

```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("{name}", custom_pipeline="pipeline", trust_remote_code=True)
```

`pipeline(context=...)` takes (n, tokens, {dim}) CLIP vectors: that of the text first, then those of the neighbors, best
first, any number of them, {lengths}. The unconditional input is one token of
zeros. `recipe.json` has all settings. With laion-rdm installed, no code of this folder runs, and a retriever searches a
database or a list of pictures. Fill in `pretrained`, the tag or file of the encoder's weights, and the folder of your
database; an encoder of a local folder is `ClipConfig(model="local-dir:FOLDER")`:

```python
from retrieval import Database
from retrieval.clip.encoder import Encoder
from retrieval.recipe import ClipConfig
from trainer.released import RetrievalDiffusionPipeline, Retriever

pipeline = RetrievalDiffusionPipeline.from_pretrained("{name}")
encoder = Encoder(ClipConfig(model="{encoder}", pretrained="..."))
retriever = Retriever(encoder, Database.open("databases/NAME"))
pictures = pipeline("two red hearts", retriever, k={k}).images
```
"""


def write_folder(root: Root, run: str, autoencoder: AutoencoderConfig, target: Path) -> None:
    """Export the finished run in folder `run`. target: must not exist or be empty.

    The demo's patch autoencoder is not a diffusers class: then there is no `vae/`. Raises UserError if the
    run was trained with another autoencoder.
    """
    from diffusers import DDIMScheduler

    manifest = read_manifest(root, run)
    recipe = root.read_json(f"{run}/recipe.json")
    if (identity := Autoencoder.load(autoencoder, "cpu").identity) != manifest.values["autoencoder"]:
        raise UserError(
            f"{root.at(run)} was trained on latents of autoencoder {manifest.values['autoencoder']}, "
            f"[autoencoder] is {identity}. Set [autoencoder] to the model's."
        )
    with _complete_folder(target) as folder:
        for name in (f"model/{CONFIG}", f"model/{WEIGHTS}", "recipe.json"):
            copy = folder / name.replace("model/", "unet/")
            copy.parent.mkdir(exist_ok=True)
            with root.local(f"{run}/{name}") as path:
                shutil.copyfile(path, copy)
        if autoencoder.kind != "patch":
            _write_vae(autoencoder, folder / "vae")
        settings = scheduler_settings(DiffusionConfig(**recipe["diffusion"]))
        scheduler: Any = DDIMScheduler(**settings, clip_sample=False)
        scheduler.save_pretrained(folder / "scheduler")
        _write_index(folder, recipe)
        (folder / "README.md").write_text(_card(target.name, manifest, recipe, folder))


def read_folder(folder: Path, config: TrainingRecipe) -> ReleasedModel:
    """Read a folder as the recipe's model. Raises UserError if a setting, a tensor or the noise schedule differs."""
    _check_schedule(folder / SCHEDULER, config.diffusion)
    _check_norm(folder / "recipe.json", config.model.context_norm)
    with torch.device("meta"):
        unet: Any = build_unet(config.model)
    _check_unet(folder / "unet" / CONFIG, unet)
    weights = _read_weights(folder / "unet" / WEIGHTS)
    expected = {name: tuple(tensor.shape) for name, tensor in unet.state_dict().items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if shapes != expected:
        different = sorted(dict(expected.items() ^ shapes.items()))
        raise UserError(
            f"{folder / 'unet' / WEIGHTS} does not fit the recipe's [model]: {len(different)} tensors are "
            f"missing, unknown or of another shape ({', '.join(different[:3])}). Download or export it again."
        )
    tensors = {name: weights[name].float() for name in expected}
    if config.autoencoder.kind == "patch":
        recipe = _read_json(folder / "recipe.json")
        _check_patch_autoencoder(folder, recipe, config.autoencoder)
        return ReleasedModel(tensors, Path(config.autoencoder.path), recipe["encoder"])
    scale = _read_json(folder / "vae" / CONFIG).get("scaling_factor")
    if scale != config.autoencoder.scale:
        raise UserError(
            f"{folder / 'vae' / CONFIG} has scaling_factor {scale}, [autoencoder] scale is "
            f"{config.autoencoder.scale}. Set the scale to the model's."
        )
    return ReleasedModel(tensors, folder / "vae")


def stated_settings(folder: Path) -> dict[str, Any]:
    """`size` and `k` of the model's training; empty for folders of other projects, which do not tell them."""
    path = folder / "recipe.json"
    recipe = _read_json(path) if path.is_file() else {}
    return {name: recipe[name] for name in ("size", "k") if name in recipe}


@contextmanager
def _complete_folder(target: Path) -> Iterator[Path]:
    """A temporary folder next to the target: renamed to the target on success, deleted on an error."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} exists and is not empty. Choose a new folder.")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".partial-", dir=target.parent))
    try:
        yield temporary
        # mkdtemp creates folders that only their owner can read.
        temporary.chmod(0o755)
        temporary.replace(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_vae(config: AutoencoderConfig, folder: Path) -> None:
    """Copy the autoencoder, with the recipe's scale as diffusers' `scaling_factor`."""
    source = Path(config.path)
    folder.mkdir()
    shutil.copyfile(source / WEIGHTS, folder / WEIGHTS)
    settings = json.loads((source / CONFIG).read_text()) | {"scaling_factor": config.scale}
    (folder / CONFIG).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")


def _write_index(folder: Path, recipe: dict[str, Any]) -> None:
    """Write `model_index.json` and the pipeline's code: diffusers opens the folder as RetrievalDiffusionPipeline."""
    shutil.copyfile(PIPELINE, folder / PIPELINE.name)
    parts = {"unet": folder / "unet" / CONFIG, "vae": folder / "vae" / CONFIG, "scheduler": folder / SCHEDULER}
    classes = {name: _read_json(path)["_class_name"] if path.is_file() else None for name, path in parts.items()}
    index = {
        "_class_name": "RetrievalDiffusionPipeline",
        **{name: ["diffusers", kind] if kind else [None, None] for name, kind in classes.items()},
        "context_norm": ModelConfig(**recipe["model"]).context_norm,
        "latent_size": recipe["latent_shape"][1:],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def _card(name: str, manifest: Manifest, recipe: dict[str, Any], folder: Path) -> str:
    has_vae, kind = (folder / "vae").is_dir(), "patch autoencoder of this project, not included"
    if has_vae:
        kind = _read_json(folder / "vae" / CONFIG)["_class_name"]
    unet = _empty_unet(_read_json(folder / "unet" / CONFIG))
    return CARD.format(
        name=name,
        parameters=unet.num_parameters(),
        size=recipe["size"],
        shape="x".join(map(str, recipe["latent_shape"])),
        k=recipe["k"],
        lengths=LENGTHS[ModelConfig(**recipe["model"]).context_norm],
        encoder=recipe["encoder"]["model"],
        dim=recipe["encoder"]["dim"],
        autoencoder=kind,
        scale=recipe["autoencoder"]["scale"],
        upstream=", ".join(f"{stage} {identity[:16]}" for stage, identity in sorted(manifest.upstream.items())),
    )


def _check_schedule(path: Path, config: DiffusionConfig) -> None:
    settings, expected = _read_json(path), scheduler_settings(config)
    rescaled = "rescale_betas_zero_snr"
    settings, expected = {rescaled: False} | settings, {rescaled: False} | expected
    for name in ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type", rescaled):
        if settings.get(name) != expected[name]:
            raise UserError(
                f"{path} has {name} {settings.get(name)!r}, [diffusion] gives {expected[name]!r}. "
                "Set [diffusion] to the model's."
            )


def _check_norm(path: Path, context_norm: ContextNorm) -> None:
    """Compare the length of the model's CLIP vectors with the recipe. Folders of other projects do not tell it."""
    if path.is_file() and (norm := ModelConfig(**_read_json(path)["model"]).context_norm) != context_norm:
        raise UserError(
            f'{path} has model.context_norm "{norm}", the recipe has "{context_norm}". Set it to the model\'s.'
        )


def _check_patch_autoencoder(folder: Path, recipe: dict[str, Any], config: AutoencoderConfig) -> None:
    """The folder has no patch autoencoder: that of the recipe must be the model's."""
    wanted, identity = recipe["autoencoder_identity"], Autoencoder.load(config, "cpu").identity
    if identity != wanted:
        raise UserError(
            f"{folder} was trained on latents of autoencoder {wanted}, [autoencoder] is {identity}. Set it to "
            "the model's."
        )


def _check_unet(path: Path, unet: Any) -> None:
    """Compare settings with the recipe: heads, groups and activations do not follow from the weights."""
    settings = _read_json(path)
    if settings.get("_class_name") != "UNet2DConditionModel":
        raise UserError(f"{path} is not the config of a UNet2DConditionModel. Wanted a folder that diffusers wrote.")
    actual = _comparable_settings(_empty_unet(settings))
    for name, expected in _comparable_settings(unet).items():
        if actual.get(name) != expected:
            raise UserError(
                f"{path} has {name} {actual.get(name)}, [model] of the recipe gives {expected}. "
                "Set [model] to the folder's model."
            )


def _empty_unet(settings: dict[str, Any]) -> Any:
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel.from_config(settings)


def _comparable_settings(unet: Any) -> dict[str, Any]:
    """Settings as decoded JSON, without notes on the writer and without the unused `sample_size`."""
    settings = json.loads(json.dumps(dict(unet.config), default=list))
    return {name: settings[name] for name in settings if not name.startswith("_") and name != "sample_size"}


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{path} is missing: wanted a folder of unet/, vae/ and scheduler/. Correct the path.")
    try:
        content: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}. Download it again.") from error
    return content


def _read_weights(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise UserError(f"{path} is missing: weights must be one safetensors file. Convert them.")
    with safetensors_errors(path):
        return load_file(path)
