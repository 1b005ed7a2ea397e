"""Row 6: encoding images to latents by KL-f16, in slices and in bf16, as `make latents` and `make train` do."""

import torch

from benchmarks.gpu.day import Cases, Day, Values, autoencoder_folder, free_memory, memory_gib, timed

IMAGES = {256: 256, 512: 64, 768: 32}
"""Images of a micro batch by size."""


def cases(day: Day) -> Cases:
    return {f"{size} px": lambda size=size: measure(day, size) for size in IMAGES}  # type: ignore[misc]


def measure(day: Day, size: int) -> Values:
    """Images per second and memory."""
    from trainer.model.autoencoder import Autoencoder
    from trainer.model.recipe import AutoencoderConfig

    config = AutoencoderConfig(kind="kl", path=str(autoencoder_folder(day)), scale=0.22765929)
    autoencoder = Autoencoder.load(config, str(day.device))
    count, edge = (2, size // 8) if day.tiny else (IMAGES[size], size)
    images = torch.rand(count, 3, edge, edge, device=day.device) * 2 - 1
    free_memory()
    seconds = timed(lambda: autoencoder.encode_moments(images), 1 if day.tiny else 4)
    return {"images_per_s": round(count / seconds, 1), "batch": count, "memory_gib": memory_gib()}
