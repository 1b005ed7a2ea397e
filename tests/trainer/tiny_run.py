"""A small finished run for tests: untrained CLIP, autoencoder and UNet, and databases of noise images.

Styles are tints, which even an untrained CLIP separates.
"""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from filelock import FileLock
from open_clip.model import CLIP
from PIL import Image
from safetensors.torch import save_file

from pipeline.embed import with_vectors
from retrieval.clip.encoder import Encoder
from retrieval.database.build import DatabaseIdentity, write_database
from retrieval.recipe import ClipConfig, IndexConfig
from retrieval.storage import schema
from retrieval.storage.manifest import Manifest, ShardRecord, write_manifest
from retrieval.storage.root import Root
from tests.fork_server import SHARED_FOLDER
from trainer.model.autoencoder import Autoencoder
from trainer.model.patch_autoencoder import PatchAutoencoder, PatchShape
from trainer.model.recipe import AutoencoderConfig, ContextNorm, DiffusionConfig, ModelConfig
from trainer.model.unet import build_unet
from trainer.sampling.sampler import TrainedModel

DIM = 32
STYLES = {"deep_red": (200, 40, 40), "green": (40, 190, 60), "sky_blue": (60, 90, 220)}
PROMPTS = ("a circle", "two squares in a row", "a star on the left")
ROWS = 24


def write_clip(folder: Path, seed: int = 0) -> ClipConfig:
    """Write an untrained open_clip model in open_clip's folder layout."""
    vision = {"image_size": 32, "layers": 1, "width": 64, "head_width": 32, "patch_size": 8}
    text = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    config = {"embed_dim": DIM, "vision_cfg": vision, "text_cfg": text}
    torch.manual_seed(seed)
    model = CLIP(**config)
    folder.mkdir(parents=True)
    preprocess = {"mean": [0.5] * 3, "std": [0.3] * 3, "size": 32}
    description = {"model_cfg": config, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(description))
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors")
    return ClipConfig(model=f"local-dir:{folder}")


def pictures_of(style: str, count: int = ROWS) -> list[Image.Image]:
    """Noise images in the style's tint."""
    rng = np.random.default_rng([3, *style.encode()])
    noise = rng.normal(0, 40, (count, 32, 32, 3)) + np.array(STYLES[style])
    return [Image.fromarray(pixels) for pixels in np.clip(noise, 0, 255).astype(np.uint8)]


def write_style_database(root: Root, name: str, encoder: Encoder, styles: list[str], rows: int = ROWS) -> None:
    """Write a database with the images of some styles."""
    names = [f"{style}-{i}" for style in styles for i in range(rows)]
    vectors = np.concatenate([encoder.encode_images(pictures_of(style, rows), unit=False) for style in styles])
    columns = {
        schema.IMAGE_ID: np.array([schema.image_id(f"{name}/{image}") for image in names]),
        "url": [f"http://example.org/{image}.jpg" for image in names],
        "caption": [f"caption of {image}" for image in names],
        "license": pa.nulls(len(names), pa.string()),
        "width": pa.array([32] * len(names), pa.int32()),
        "height": pa.array([32] * len(names), pa.int32()),
    }
    table = with_vectors(pa.table(columns), vectors)
    identity = DatabaseIdentity(name, {"source": f"test {name}"})
    write_database(root, table, encoder.identity, IndexConfig(), identity)


def write_model(
    root: Root, encoder: Encoder, autoencoder: Autoencoder, name: str = "tiny", context_norm: ContextNorm = "unit"
) -> None:
    """Write an untrained UNet in the layout of a finished run."""
    stage, shape = f"runs/{name}/train", (autoencoder.channels, 8, 8)
    config = ModelConfig(
        latent_channels=shape[0],
        context_dim=DIM,
        context_norm=context_norm,
        channels=(32, 32),
        attention=(1, 2),
        layers=1,
        norm_groups=8,
        channels_per_head=16,
    )
    torch.manual_seed(1)
    unet = build_unet(config)
    with torch.no_grad():
        # The context has too little effect on an untrained network to change 8-bit pixels.
        for parameter, weights in unet.named_parameters():
            if "attn2.to_out" in parameter or "attn2.to_v" in parameter:
                weights.mul_(4)
    unet.save_pretrained(root.local_path(f"{stage}/model"), safe_serialization=True)
    recipe = {
        "model": config.model_dump(mode="json"),
        "diffusion": DiffusionConfig(prediction="v_prediction").model_dump(mode="json"),
    }
    root.write_json(f"{stage}/recipe.json", recipe)
    files = []
    for file in root.list(f"{stage}/model"):
        with root.open(file) as stored:
            files.append(root.write_bytes(file, stored.read()))
    values = {
        "encoder": encoder.identity.model_dump(mode="json"),
        "autoencoder": autoencoder.identity,
        "latent_shape": list(shape),
    }
    shard = ShardRecord("model", 1, tuple(files))
    write_manifest(root, Manifest(stage, schema.VERSION, "train-print", {}, {}, (shard,), values, 0.0))


def tiny_autoencoder(folder: Path, seed: int = 0) -> AutoencoderConfig:
    """Write a patch autoencoder fitted to the styles' images: factor 4, 4 channels."""
    torch.manual_seed(seed)
    model = PatchAutoencoder(PatchShape(factor=4, channels=4, hidden=8, blocks=1))
    pictures = np.stack([np.asarray(image) for style in STYLES for image in pictures_of(style)])
    model.fit_components(torch.from_numpy(pictures).movedim(-1, 1) / 127.5 - 1)
    model.save(folder / "autoencoder")
    return AutoencoderConfig(kind="patch", path=str(folder / "autoencoder"))


def write_run(folder: Path) -> tuple[Root, TrainedModel]:
    """Write all inputs of `sample` and `evaluate`. They are made once for all test processes and copied."""
    source = Path(os.environ[SHARED_FOLDER]) / "tiny-run"
    with FileLock(f"{source}.lock"):
        if not source.exists():
            make_run(source.with_name("tiny-run-unfinished"))
            source.with_name("tiny-run-unfinished").rename(source)
    shutil.copytree(source, folder, dirs_exist_ok=True)
    clip = ClipConfig(model=f"local-dir:{folder}/clip")
    autoencoder = AutoencoderConfig(kind="patch", path=str(folder / "autoencoder"))
    return Root(folder / "root"), TrainedModel(name="tiny", clip=clip, autoencoder=autoencoder)


def make_run(folder: Path) -> None:
    autoencoder = tiny_autoencoder(folder)
    root, encoder = Root(folder / "root"), Encoder(write_clip(folder / "clip"))
    for style in STYLES:
        write_style_database(root, f"databases/{style}", encoder, [style])
    write_style_database(root, "index", encoder, list(STYLES))
    write_model(root, encoder, Autoencoder.load(autoencoder, "cpu"))
