"""Row 7: sampling at 768 px with the 1.3B UNet in bf16, guidance 5, decoded by KL-f16."""

from functools import partial
from typing import Any

import torch

from benchmarks.gpu.day import Cases, Day, Values, autoencoder_folder, free_memory, memory_gib, timed, training_stage

SAMPLERS = {"DDIM, 50 steps": ("ddim", 50), "DPM-Solver++, 20 steps": ("dpm++", 20)}
CONTEXT_TOKENS = 20
"""A prompt and its 19 neighbors."""
BATCH = 8


def cases(day: Day) -> Cases:
    """Cases by name; those that are not compiled first."""
    named: Cases = {}
    for compiled in (False, True):
        for name, (scheduler, steps) in SAMPLERS.items():
            label = f"{name}, compiled" if compiled else name
            named[label] = partial(measure, day, scheduler, 2 if day.tiny else steps, compiled)
    return named


def measure(day: Day, scheduler_name: str, steps: int, compiled: bool) -> Values:
    """Images per second, decoding included."""
    from trainer.model.autoencoder import Autoencoder
    from trainer.model.recipe import AutoencoderConfig, DiffusionConfig
    from trainer.model.schedulers import make_scheduler
    from trainer.model.unet import build_unet
    from trainer.sampling.denoising import guided_sample, initial_noise, padded, with_token_weights

    stage, device = training_stage(day, 768), day.device
    with device:
        unet: Any = build_unet(stage.model).eval()
    autoencoder = Autoencoder.load(AutoencoderConfig(kind="kl", path=str(autoencoder_folder(day))), str(device))
    count = 1 if day.tiny else BATCH
    context = torch.nn.functional.normalize(
        torch.randn(count, CONTEXT_TOKENS, stage.model.context_dim, device=device), dim=-1
    )
    if compiled:  # as `Sampler` does
        context, weights = padded(context, torch.ones(count, CONTEXT_TOKENS, device=device))
        unet = with_token_weights(torch.compile(unet), weights)
    noise = initial_noise(range(count), stage.latent_shape).to(device)
    guidance = torch.full((count,), 5.0, device=device)

    @torch.inference_mode()
    def draw() -> torch.Tensor:
        scheduler = make_scheduler(scheduler_name, steps, DiffusionConfig())
        with torch.autocast(device.type, torch.bfloat16):
            latents = guided_sample(unet, scheduler, noise, context, guidance)
        return autoencoder.decode(latents.float())

    free_memory()
    seconds = timed(draw, 1 if day.tiny else 2, warm_up=1)
    return {"images_per_s": round(count / seconds, 3), "batch": count, "memory_gib": memory_gib()}
