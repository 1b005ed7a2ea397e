"""Imports a released model as a finished run, for sampling and `train.start_from`.

Reads a CompVis checkpoint, a diffusers folder or the folder of another run; writes `runs/<name>/train` (model, recipe,
manifest) and the autoencoder's folder, or the autoencoder's folder alone. The recipe provides what the files do not
contain (encoder, heads, size, k).
"""

import hashlib
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from retrieval.clip.identity import EncoderIdentity
from retrieval.errors import UserError
from retrieval.storage import schema
from retrieval.storage.manifest import Manifest, files_exist, fingerprint, read_manifest
from retrieval.storage.root import Root, file_sha256
from trainer.checkpoint.export import CONFIG, WEIGHTS, FinishedRun, publish_run
from trainer.data.latents import latent_shape
from trainer.model.autoencoder import Autoencoder
from trainer.model.recipe import AutoencoderConfig, ModelConfig
from trainer.recipe import TrainingRecipe
from trainer.released.checkpoint_import import ReleasedModel, read_autoencoder, read_checkpoint
from trainer.released.diffusers_folder import read_folder, stated_settings
from trainer.released.run_folder import SourceRun


def import_model(
    config: TrainingRecipe, source: Path, encoder: EncoderIdentity, root: Root, name_setting: str = "train.name"
) -> Manifest:
    """Import a checkpoint, a diffusers folder or a run as the recipe's finished run, unless that is done already.

    name_setting: of the recipe, for the message if the folder has another run. Raises UserError for this, and if the
    model does not match the recipe.
    """
    started = time.monotonic()
    if encoder.dim != config.model.context_dim:
        raise UserError(
            f"[clip] has dimension {encoder.dim}, [model] context_dim is {config.model.context_dim}. "
            "Set [clip] to the encoder that the model was trained with."
        )
    source_run = SourceRun.open(source)
    upstream = {"released": source_run.digest() if source_run else _digest(source), "encoder": encoder.digest}
    fingerprint_ = fingerprint("train", schema.VERSION, config, upstream)
    if (finished := _finished(root, config.train.folder, fingerprint_, name_setting)) is not None:
        return finished
    with tempfile.TemporaryDirectory(prefix="rdm-") as temporary:
        released = source_run.read(config) if source_run else _read(source, config, Path(temporary))
        if released.encoder not in (None, encoder.model_dump(mode="json")):
            raise UserError(f"{source} was trained with {released.encoder}, [clip] is {encoder}. Set it to the run's.")
        autoencoder = _place_autoencoder(released.autoencoder, config.autoencoder, config.model)
    run = FinishedRun(
        config=config,
        fingerprint=fingerprint_,
        upstream=upstream,
        encoder=encoder.model_dump(mode="json"),
        autoencoder=autoencoder.identity,
        latent_shape=latent_shape(config.train.size, autoencoder),
    )
    return publish_run(run, root, released.unet, {}, time.monotonic() - started)


def trained_with(source: Path) -> dict[str, Any]:
    """`size` and `k` of section `train` that a model was trained with; empty if its files do not tell them."""
    source_run = SourceRun.open(source)
    return source_run.trained_with() if source_run else stated_settings(source)


def import_autoencoder(config: AutoencoderConfig, source: Path, model: ModelConfig | None = None) -> Autoencoder:
    """Take the autoencoder out of a checkpoint file and write it to the path in the recipe. Returns it.

    model: takes its latents, if the recipe has one. Raises UserError as `import_model` does.
    """
    with tempfile.TemporaryDirectory(prefix="rdm-") as temporary:
        read_autoencoder(source, config, Path(temporary))
        return _place_autoencoder(Path(temporary), config, model)


def _read(source: Path, config: TrainingRecipe, temporary: Path) -> ReleasedModel:
    """Read a checkpoint file or a diffusers folder. temporary: for an autoencoder that has to be converted."""
    return read_folder(source, config) if source.is_dir() else read_checkpoint(source, config, temporary)


def _digest(source: Path) -> str:
    """SHA-256 of a file, or of all files of a folder."""
    if not source.exists():
        raise UserError(f"{source} does not exist: wanted a checkpoint or a diffusers folder. Correct the path.")
    if source.is_file():
        return file_sha256(source)
    sums = [(str(path.relative_to(source)), file_sha256(path)) for path in sorted(source.rglob("*")) if path.is_file()]
    return hashlib.sha256(json.dumps(sums).encode()).hexdigest()


def _finished(root: Root, folder: str, fingerprint_: str, name_setting: str) -> Manifest | None:
    """The manifest if this import is finished. Raises UserError if the folder has files of another run."""
    if root.exists(f"{folder}/manifest.json"):
        manifest = read_manifest(root, folder)
        if manifest.fingerprint == fingerprint_:
            if all(files_exist(root, shard) for shard in manifest.shards):
                return manifest
            root.delete(f"{folder}/manifest.json")
    # An import writes its manifest last: an interrupted one leaves only these files.
    partial = {f"{folder}/{name}" for name in (f"model/{CONFIG}", f"model/{WEIGHTS}", "recipe.json")}
    if others := [name for name in root.list(folder) if name not in partial]:
        raise UserError(
            f"{root.at(folder)} has another run, or one that was imported with other settings ({others[0]}). Set "
            f"{name_setting} to a new name."
        )
    return None


def _place_autoencoder(source: Path, target: AutoencoderConfig, model: ModelConfig | None) -> Autoencoder:
    """Copy the autoencoder to the path in the recipe and open it. An existing one must be the same."""
    imported = Autoencoder.load(target.model_copy(update={"path": str(source)}), "cpu")
    if model and imported.channels != model.latent_channels:
        raise UserError(
            f"the imported autoencoder's latents have {imported.channels} channels, [model] latent_channels "
            f"is {model.latent_channels}. Change it."
        )
    if not (Path(target.path) / CONFIG).is_file():
        _copy(source, target)
    if Autoencoder.load(target, "cpu").identity != imported.identity:
        raise UserError(
            f"{target.path} has another autoencoder than the imported model. Set [autoencoder] path to a new folder."
        )
    return imported


def _copy(source: Path, target: AutoencoderConfig) -> None:
    """Copy weights, then the config: without a config the folder counts as missing."""
    folder = Root(target.path)
    for name in (WEIGHTS, CONFIG):
        with folder.writing(name) as pending:
            shutil.copyfile(source / name, pending.path)
