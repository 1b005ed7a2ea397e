"""A model as a folder that diffusers opens without us: `unet/`, `vae/`, `scheduler/` and a model card.

Reads a finished run and its autoencoder and writes such a folder; reads such a folder, from here or from
elsewhere, as a released model. Safetensors only.
"""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from retrieval.errors import UserError
from retrieval.storage.manifest import Manifest, read_manifest
from retrieval.storage.root import Root
from trainer.checkpoint.export import CONFIG, WEIGHTS
from trainer.model.autoencoder import Autoencoder
from trainer.model.diffusion import scheduler_settings
from trainer.model.unet import build_unet
from trainer.recipe import AutoencoderConfig, DiffusionConfig, TrainingRecipe
from trainer.released.checkpoint_import import ReleasedModel
from trainer.sampling.denoising import make_scheduler

SCHEDULER = "scheduler/scheduler_config.json"
CARD = """---
library_name: diffusers
tags: [retrieval-augmented, latent-diffusion]
---
# {name}

A retrieval-augmented latent diffusion model: its cross-attention reads CLIP vectors of neighbors.

- UNet: {parameters:,} parameters, trained at {size} px ({shape} latents) with {k} neighbors.
- Encoder of the vectors: {encoder}, {dim} numbers each.
- Autoencoder: {autoencoder}; latents are multiplied by {scale}.
- Made from: {upstream}.

```python
from diffusers import {classes}DDIMScheduler, UNet2DConditionModel

unet = UNet2DConditionModel.from_pretrained("{name}", subfolder="unet")
scheduler = DDIMScheduler.from_pretrained("{name}", subfolder="scheduler")
{open_vae}```

`encoder_hidden_states` is (n, tokens, {dim}): the unit vector of the text first, then those of the neighbors,
best first, as many as there are. No condition is one token of zeros. `recipe.json` says the rest.
"""


def write_folder(root: Root, run: str, autoencoder: AutoencoderConfig, target: Path) -> None:
    """Export the finished run in folder `run`. target: a folder that is not there yet, or is empty.

    The demo's own autoencoder is no class of diffusers, so `vae/` is left out there. Raises UserError where
    the run was trained with another autoencoder.
    """
    manifest = read_manifest(root, run)
    recipe = root.read_json(f"{run}/recipe.json")
    if (found := Autoencoder.load(autoencoder, "cpu").identity) != manifest.values["autoencoder"]:
        raise UserError(
            f"{root.at(run)} was trained on latents of autoencoder {manifest.values['autoencoder']}, "
            f"[autoencoder] is {found}. Set [autoencoder] to the model's."
        )
    with _made_whole(target) as folder:
        for name in (f"model/{CONFIG}", f"model/{WEIGHTS}", "recipe.json"):
            place = folder / name.replace("model/", "unet/")
            place.parent.mkdir(exist_ok=True)
            with root.local(f"{run}/{name}") as path:
                shutil.copyfile(path, place)
        if autoencoder.kind != "patch":
            _write_vae(autoencoder, folder / "vae")
        scheduler: Any = make_scheduler("ddim", 50, DiffusionConfig(**recipe["diffusion"]))
        scheduler.save_pretrained(folder / "scheduler")
        (folder / "README.md").write_text(_card(target.name, manifest, recipe, folder))


def read_folder(folder: Path, config: TrainingRecipe) -> ReleasedModel:
    """A folder of `unet/`, `vae/` and `scheduler/` as the recipe's model.

    Raises UserError where a setting, a tensor or the noise schedule differs from the recipe's.
    """
    _check_schedule(folder / SCHEDULER, config.diffusion)
    with torch.device("meta"):
        unet: Any = build_unet(config.model)
    _check_unet(folder / "unet" / CONFIG, unet)
    weights = _read_weights(folder / "unet" / WEIGHTS)
    wanted = {name: tuple(tensor.shape) for name, tensor in unet.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if wanted != found:
        odd = sorted(dict(wanted.items() ^ found.items()))
        raise UserError(
            f"{folder / 'unet' / WEIGHTS} does not fit the recipe's [model]: {len(odd)} tensors are missing, "
            f"left over or of another shape ({', '.join(odd[:3])}). Fetch or write it again."
        )
    scale = _read_json(folder / "vae" / CONFIG).get("scaling_factor")
    if scale != config.autoencoder.scale:
        raise UserError(
            f"{folder / 'vae' / CONFIG} has scaling_factor {scale}, [autoencoder] scale is "
            f"{config.autoencoder.scale}. Set the scale to the model's."
        )
    return ReleasedModel({name: weights[name].float() for name in wanted}, folder / "vae")


@contextmanager
def _made_whole(target: Path) -> Iterator[Path]:
    """A folder beside the target that takes its place when the block ends well, and vanishes else."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} is there already and not empty. Name a folder that is not there yet.")
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".partial-", dir=target.parent))
    try:
        yield scratch
        # mkdtemp lets nobody else in
        scratch.chmod(0o755)
        scratch.replace(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _write_vae(config: AutoencoderConfig, folder: Path) -> None:
    """The autoencoder's folder, with the recipe's scale where diffusers looks for it."""
    source = Path(config.path)
    folder.mkdir()
    shutil.copyfile(source / WEIGHTS, folder / WEIGHTS)
    settings = json.loads((source / CONFIG).read_text()) | {"scaling_factor": config.scale}
    (folder / CONFIG).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")


def _card(name: str, manifest: Manifest, recipe: dict[str, Any], folder: Path) -> str:
    has_vae = (folder / "vae").is_dir()
    kind = _read_json(folder / "vae" / CONFIG)["_class_name"] if has_vae else "of this project, not in here"
    unet = _empty_unet(_read_json(folder / "unet" / CONFIG))
    return CARD.format(
        name=name,
        parameters=unet.num_parameters(),
        size=recipe["size"],
        shape="x".join(map(str, recipe["latent_shape"])),
        k=recipe["k"],
        encoder=recipe["encoder"]["model"],
        dim=recipe["encoder"]["dim"],
        autoencoder=kind,
        scale=recipe["autoencoder"]["scale"],
        upstream=", ".join(f"{stage} {print_[:16]}" for stage, print_ in sorted(manifest.upstream.items())),
        classes=f"{kind}, " if has_vae else "",
        open_vae=f'vae = {kind}.from_pretrained("{name}", subfolder="vae")\n' if has_vae else "",
    )


def _check_schedule(path: Path, config: DiffusionConfig) -> None:
    found, wanted = _read_json(path), scheduler_settings(config)
    for name in ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type"):
        if found.get(name) != wanted[name]:
            raise UserError(
                f"{path} has {name} {found.get(name)!r}, the recipe's [diffusion] makes it {wanted[name]!r}. "
                "Set [diffusion] to the model's."
            )


def _check_unet(path: Path, unet: Any) -> None:
    """Weights do not tell heads, groups or activations: the settings must be the recipe's too."""
    settings = _read_json(path)
    if settings.get("_class_name") != "UNet2DConditionModel":
        raise UserError(f"{path} describes no UNet2DConditionModel. Wanted a folder that diffusers wrote.")
    theirs = _plain(_empty_unet(settings))
    for name, wanted in _plain(unet).items():
        if theirs.get(name) != wanted:
            raise UserError(
                f"{path} has {name} {theirs.get(name)}, the recipe's [model] makes it {wanted}. "
                "Set [model] to the folder's model."
            )


def _empty_unet(settings: dict[str, Any]) -> Any:
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel.from_config(settings)


def _plain(unet: Any) -> dict[str, Any]:
    """Settings as JSON gives them back, without notes on the writer and the size that nothing depends on."""
    settings = json.loads(json.dumps(dict(unet.config), default=list))
    return {name: settings[name] for name in settings if not name.startswith("_") and name != "sample_size"}


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(
            f"{path} is missing: wanted a folder of unet/, vae/ and scheduler/. Correct the path."
        )
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is no JSON: {error}. Fetch it again.") from error
    return found


def _read_weights(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise UserError(f"{path} is missing: weights are read from safetensors, in one file. Write it so.")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path} is no safetensors file: {error}. Fetch it again.") from error
