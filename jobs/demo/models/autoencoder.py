"""Trains the demo's autoencoder on scenes that it draws, so that the demo downloads no published one.

Writes a folder that `trainer.model.autoencoder` opens with kind = "patch" and scale = 1.0.
"""

from pathlib import Path

import numpy as np
import torch
from torch.nn import functional
from tqdm import trange

from jobs.demo.models.training import bfloat16_autocast, warm_up_and_decay
from jobs.demo.recipe import AutoencoderTraining
from jobs.demo.world.training_scenes import draw_training_scenes
from trainer.model.patch_autoencoder import PatchAutoencoder, PatchShape

IMAGE_SIZE = 64


def train_autoencoder(config: AutoencoderTraining, folder: Path) -> dict[str, float]:
    """Train and write the model. Returns its scale and the PSNR in dB on test scenes."""
    torch.set_num_threads(config.num_threads)
    torch.manual_seed(config.seed)
    images = _scenes(config.num_scenes, config.seed, config.num_threads)
    network = PatchAutoencoder(PatchShape(channels=config.channels))
    network.fit_components(images[:1000])
    _fit(network, images, config)
    network.save(folder)
    test = _scenes(config.num_test_scenes, config.seed + 1, config.num_threads)
    return {"psnr_db": psnr_db(network, test), "scale": 1.0}


@torch.inference_mode()
def psnr_db(network: PatchAutoencoder, images: torch.Tensor) -> float:
    """Peak signal-to-noise ratio of decoded images, over all of them. images: in [-1, 1]."""
    decoded = torch.cat([network.decode(network.encode(batch)).clamp(-1, 1) for batch in images.split(128)])
    return (10 * torch.log10(4 / (decoded - images).square().mean())).item()


def _scenes(num_scenes: int, seed: int, num_workers: int) -> torch.Tensor:
    """(n, 3, 64, 64) float32 in [-1, 1]."""
    _, pixels = draw_training_scenes(num_scenes, IMAGE_SIZE, seed, num_workers)
    return torch.from_numpy(pixels).float() / 127.5 - 1


def _fit(network: PatchAutoencoder, images: torch.Tensor, config: AutoencoderTraining) -> None:
    optimizer = torch.optim.AdamW(network.parameters(), lr=config.learning_rate, weight_decay=1e-4)
    schedule = warm_up_and_decay(optimizer, config.steps)
    progress = trange(config.steps, desc="autoencoder", unit="step", mininterval=1)
    for step in progress:
        rng = np.random.default_rng([config.seed, step])
        batch = _augment(images[rng.integers(0, len(images), config.batch_size)], rng)
        batch = batch.contiguous(memory_format=torch.channels_last)
        with bfloat16_autocast():
            latents = network.encode(batch)
            noise = torch.from_numpy(rng.standard_normal(latents.shape, dtype=np.float32))
            decoded = network.decode(latents + config.latent_noise * noise)
        loss = functional.mse_loss(decoded.float(), batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        progress.set_postfix(psnr_db=f"{10 * np.log10(4 / loss.item()):.1f}", refresh=False)


def _augment(images: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Shift by whole pixels and mirror, so that textures occur at every offset from the patches."""
    shift = rng.integers(0, IMAGE_SIZE, 2)
    rolled = torch.roll(images, (int(shift[0]), int(shift[1])), dims=(2, 3))
    return rolled.flip(3) if rng.random() < 0.5 else rolled
