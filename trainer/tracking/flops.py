"""Utilization of the devices: FLOPs of the model, peak rate of the devices, memory in use.

Model FLOPs utilization (MFU) is images per second times FLOPs per training image, divided by the dense bf16 rate that
the data sheets give all devices, in every number format. Devices that are not in the table, such as CPUs, have no MFU.
FLOPs are those of the UNet's forward and backward pass, counted from shapes on the meta device. Recomputed activations
and the autoencoder do not count.
"""

import logging
import resource
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from trainer.data.plan import TrainingPlan
from trainer.engine.deepspeed_engine import Ranks
from trainer.model.autoencoder import kl_f16, vq_f4
from trainer.model.patch_autoencoder import PatchAutoencoder, PatchShape
from trainer.model.recipe import AutoencoderKind, ModelConfig
from trainer.model.unet import build_unet

log = logging.getLogger("train")

TERA = 1e12
PEAK_TFLOPS = {
    "B200": 2250.0,
    "H200": 989.0,
    "H100 NVL": 835.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "H800": 989.0,
    "H20": 148.0,
    "A100": 312.0,
    "A800": 312.0,
    "A30": 165.0,
    "A40": 149.7,
    "L40S": 362.0,
    "L40": 181.0,
    "L4": 121.0,
    "RTX 6000 Ada": 364.0,
    "RTX A6000": 154.8,
    "RTX 4090": 165.2,
    "RTX 3090": 71.0,
    "MI300X": 1307.0,
}
"""Dense bf16 TFLOP/s from data sheets, without sparsity, by words of the device's name."""

AUTOENCODERS: dict[AutoencoderKind, Callable[[], Any]] = {
    "kl": kl_f16,
    "vq": vq_f4,
    "patch": partial(PatchAutoencoder, PatchShape()),
}
"""The paper's autoencoders, and the demo's, with random weights."""


@dataclass(frozen=True)
class UtilizationMeter:
    """Computes MFU and memory. flops_per_image: forward and backward pass, 0 without a peak rate; world: devices."""

    flops_per_image: float
    peak: float | None
    """Dense bf16 FLOP/s of one device by its data sheet; None if unknown."""
    world: int
    device: torch.device

    def mfu(self, images_per_s: float) -> float | None:
        """Model FLOPs utilization, 0 to 1; None if the device's rate is unknown."""
        return images_per_s * self.flops_per_image / (self.peak * self.world) if self.peak else None

    def memory_gib(self) -> float:
        """Peak memory of this process, GiB: allocated by torch on a GPU, resident memory on a CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**30
        status = Path("/proc/self/status")
        if not status.exists():
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30  # macOS counts bytes
        lines = status.read_text().splitlines()
        [kib] = [line.split()[1] for line in lines if line.startswith("VmHWM:")]
        return int(kib) / 2**20


def make_utilization_meter(plan: TrainingPlan, ranks: Ranks) -> UtilizationMeter:
    """The meter of a run on these ranks. Logs the peak rate and, where there is one, the FLOPs per image."""
    name = device_name(ranks.device)
    peak = known_peak(name)
    if not peak:
        log.info(f"no data sheet of {name}, no MFU")
        return UtilizationMeter(0, None, ranks.world, ranks.device)
    config = plan.config
    flops = training_flops(config.model, plan.training_set.latent_shape, config.train.context_tokens)
    rate = f"MFU is relative to {peak / TERA:,.0f} TFLOP/s of {name}"
    log.info(f"{flops / 1e9:,.2f} GFLOP of the UNet per image; {rate}")
    return UtilizationMeter(flops, peak, ranks.world, ranks.device)


def training_flops(config: ModelConfig, latent_shape: tuple[int, int, int], k: int) -> float:
    """FLOPs of one training image: 3 times the forward pass. k: number of context tokens."""
    with torch.device("meta"):
        unet = build_unet(config)
        inputs = (torch.empty(1, *latent_shape), torch.empty(1), torch.empty(1, k, config.context_dim))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        unet(*inputs)
    return 3.0 * counter.get_total_flops()


def encoding_flops(kind: AutoencoderKind, size: int) -> float:
    """FLOPs to encode one image of size x size pixels with the paper's autoencoder of a kind, or with the demo's."""
    with torch.device("meta"):
        autoencoder = AUTOENCODERS[kind]()
        image = torch.empty(1, 3, size, size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        autoencoder.encode(image)
    return float(counter.get_total_flops())


def device_name(device: torch.device) -> str:
    """The name that torch has for a GPU, else `CPU`."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def known_peak(name: str) -> float | None:
    """Dense bf16 FLOP/s of a device by name; None if it is not in PEAK_TFLOPS."""
    words = name.split()
    matches = [key for key in PEAK_TFLOPS if _matches(key.split(), words)]
    return PEAK_TFLOPS[max(matches, key=len)] * TERA if matches else None


def _matches(key: list[str], words: list[str]) -> bool:
    """True if each word of a key is a word of the name, or its part before a dash (A100-SXM4-80GB)."""
    return all(any(word == part or word.startswith(f"{part}-") for word in words) for part in key)
