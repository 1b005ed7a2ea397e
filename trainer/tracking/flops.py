"""Utilization of the devices: FLOPs of the model, peak rate of the devices, memory in use.

Model FLOPs utilization (MFU) is images per second times FLOPs per training image, divided by the peak rate
of all devices. FLOPs are those of the UNet's forward and backward pass, counted from shapes on the meta
device. Recomputed activations and the autoencoder do not count.
"""

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch.utils.flop_counter import FlopCounterMode

from trainer.data.plan import TrainingPlan
from trainer.engine.deepspeed_engine import Ranks
from trainer.model.unet import build_unet
from trainer.recipe import ModelConfig

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


@dataclass(frozen=True)
class PeakRate:
    """FLOP/s that one device can reach, and the source of the number."""

    flops_per_s: float
    source: str


@dataclass(frozen=True)
class UtilizationMeter:
    """Computes MFU and memory. flops_per_image: forward and backward pass; world: number of devices."""

    flops_per_image: float
    peak: PeakRate
    world: int
    device: torch.device

    def mfu(self, images_per_s: float) -> float:
        """Model FLOPs utilization, 0 to 1."""
        return images_per_s * self.flops_per_image / (self.peak.flops_per_s * self.world)

    def memory_gib(self) -> float:
        """Peak memory of this process, GiB: allocated by torch on a GPU, resident memory on a CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**30
        lines = Path("/proc/self/status").read_text().splitlines()
        [kib] = [line.split()[1] for line in lines if line.startswith("VmHWM:")]
        return int(kib) / 2**20


def make_utilization_meter(plan: TrainingPlan, ranks: Ranks) -> UtilizationMeter:
    """The meter of a run on these ranks. Logs the FLOPs per image and the peak rate."""
    config = plan.config
    flops = training_flops(config.model, plan.training_set.latent_shape, config.train.context_tokens)
    peak = peak_rate(ranks.device, config.train.precision)
    rate = f"{peak.flops_per_s / TERA:,.3f} TFLOP/s per rank ({peak.source})"
    log.info(f"MFU counts {flops / 1e9:,.2f} GFLOP per image against {rate}")
    return UtilizationMeter(flops, peak, ranks.world, ranks.device)


def training_flops(config: ModelConfig, latent_shape: tuple[int, int, int], k: int) -> float:
    """FLOPs of one training image: 3 times the forward pass. k: number of context tokens."""
    with torch.device("meta"):
        unet = build_unet(config)
        inputs = (torch.empty(1, *latent_shape), torch.empty(1), torch.empty(1, k, config.context_dim))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        unet(*inputs)
    return 3.0 * counter.get_total_flops()


def peak_rate(device: torch.device, precision: Literal["fp32", "bf16"]) -> PeakRate:
    """Peak rate of a device in a number format: from PEAK_TFLOPS, else measured."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    if precision == "bf16" and (known := known_peak(name)):
        return PeakRate(known, f"{name}, data sheet")
    return PeakRate(_matmul_rate(device, precision), f"{name}, {precision} matrix product measured")


def known_peak(name: str) -> float | None:
    """Dense bf16 FLOP/s of a device by name; None if it is not in PEAK_TFLOPS."""
    words = name.split()
    matches = [key for key in PEAK_TFLOPS if _matches(key.split(), words)]
    return PEAK_TFLOPS[max(matches, key=len)] * TERA if matches else None


def _matches(key: list[str], words: list[str]) -> bool:
    """True if each word of a key is a word of the name, or its part before a dash (A100-SXM4-80GB)."""
    return all(any(word == part or word.startswith(f"{part}-") for word in words) for part in key)


def _matmul_rate(device: torch.device, precision: Literal["fp32", "bf16"]) -> float:
    """FLOP/s of the fastest of five square matrix products."""
    edge = 8192 if device.type == "cuda" else 768
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    # Random numbers: a GPU multiplies constant matrices with less power and therefore faster.
    generator = torch.Generator(device).manual_seed(0)
    factors = torch.rand(2, edge, edge, device=device, generator=generator).to(dtype)
    return max(2 * edge**3 / _seconds_of_product(*factors) for _ in range(5))


def _seconds_of_product(left: torch.Tensor, right: torch.Tensor) -> float:
    began = time.perf_counter()
    product = left @ right
    product[0, 0].item()  # waits for the GPU
    return time.perf_counter() - began
