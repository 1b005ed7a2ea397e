"""A released model as a finished run, so that sampling and `train.start_from` take it like one of ours.

Reads a CompVis checkpoint or a diffusers folder; writes `runs/<name>/train` (model, recipe, manifest) and
the autoencoder's folder. What the file cannot say (encoder, heads, size, k) is the recipe's.
"""

import hashlib
import json
import shutil
import tempfile
import time
from pathlib import Path

from retrieval.clip.identity import EncoderIdentity
from retrieval.errors import UserError
from retrieval.storage import schema
from retrieval.storage.manifest import Manifest, files_exist, fingerprint, read_manifest
from retrieval.storage.root import Root, file_sha256
from trainer.checkpoint.export import CONFIG, WEIGHTS, FinishedRun, publish_run
from trainer.data.latents import latent_shape
from trainer.model.autoencoder import Autoencoder
from trainer.recipe import AutoencoderConfig, TrainingRecipe
from trainer.released.checkpoint_import import read_checkpoint
from trainer.released.diffusers_folder import read_folder


def import_model(config: TrainingRecipe, source: Path, encoder: EncoderIdentity, root: Root) -> Manifest:
    """Take the model of a checkpoint or a diffusers folder as the recipe's finished run.

    What was imported is not imported again, what stopped halfway is; any other run in the folder is left
    alone. Raises UserError where the recipe and what is imported do not fit.
    """
    began = time.monotonic()
    if encoder.dim != config.model.context_dim:
        raise UserError(
            f"[clip] makes vectors of {encoder.dim}, [model] context_dim is {config.model.context_dim}. "
            "Set [clip] to the encoder that the model was trained with."
        )
    upstream = {"released": _digest(source), "encoder": encoder.digest}
    fingerprint_ = fingerprint("train", schema.VERSION, config, upstream)
    if (finished := _finished(root, config.train.folder, fingerprint_)) is not None:
        return finished
    with tempfile.TemporaryDirectory(prefix="rdm-") as scratch:
        if source.is_dir():
            released = read_folder(source, config)
        else:
            released = read_checkpoint(source, config, Path(scratch))
        autoencoder = _take_autoencoder(released.autoencoder, config)
    run = FinishedRun(
        config=config,
        fingerprint=fingerprint_,
        upstream=upstream,
        encoder=encoder.model_dump(mode="json"),
        autoencoder=autoencoder.identity,
        latent_shape=latent_shape(config.train.size, autoencoder),
    )
    return publish_run(run, root, released.unet, {}, time.monotonic() - began)


def _digest(source: Path) -> str:
    """SHA-256 of a file, or of all the files of a folder."""
    if not source.exists():
        raise UserError(
            f"{source} is not there: wanted a checkpoint or a diffusers folder. Correct the path."
        )
    if source.is_file():
        return file_sha256(source)
    sums = [
        (str(path.relative_to(source)), file_sha256(path))
        for path in sorted(source.rglob("*"))
        if path.is_file()
    ]
    return hashlib.sha256(json.dumps(sums).encode()).hexdigest()


def _finished(root: Root, folder: str, fingerprint_: str) -> Manifest | None:
    """The manifest if this very import is done. Raises UserError if the folder holds anything else."""
    if root.exists(f"{folder}/manifest.json"):
        manifest = read_manifest(root, folder)
        if manifest.fingerprint == fingerprint_:
            if all(files_exist(root, shard) for shard in manifest.shards):
                return manifest
            root.delete(f"{folder}/manifest.json")
    # an import writes its manifest last, so what it left halfway has none
    ours = {f"{folder}/{name}" for name in (f"model/{CONFIG}", f"model/{WEIGHTS}", "recipe.json")}
    if others := [name for name in root.list(folder) if name not in ours]:
        raise UserError(
            f"{root.at(folder)} holds another run ({others[0]}). Set train.name to a new one, or remove the "
            "folder."
        )
    return None


def _take_autoencoder(source: Path, config: TrainingRecipe) -> Autoencoder:
    """The imported autoencoder in the place where the recipe expects it, opened.

    What stands there already must be the same.
    """
    wanted = config.autoencoder
    imported = Autoencoder.load(wanted.model_copy(update={"path": str(source)}), "cpu")
    if imported.channels != config.model.latent_channels:
        raise UserError(
            f"the imported autoencoder's latents have {imported.channels} channels, [model] latent_channels "
            f"is {config.model.latent_channels}. Set it."
        )
    if not (Path(wanted.path) / CONFIG).is_file():
        _copy(source, wanted)
    if Autoencoder.load(wanted, "cpu").identity != imported.identity:
        raise UserError(
            f"{wanted.path} holds another autoencoder than the one that is imported. "
            "Set [autoencoder] path to a new folder."
        )
    return imported


def _copy(source: Path, wanted: AutoencoderConfig) -> None:
    """The description last: a folder without it does not open."""
    place = Root(wanted.path)
    for name in (WEIGHTS, CONFIG):
        with place.writing(name) as pending:
            shutil.copyfile(source / name, pending.path)
