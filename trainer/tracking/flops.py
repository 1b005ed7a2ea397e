"""How hard a device works: operations of the model, what the device can do, memory in use.

Model FLOPs utilization (MFU) is images a second times the operations a training image needs, over what
all devices could do. Operations are those of the UNet forward and backward, counted once on shapes
alone; activations computed a second time and the autoencoder do not count.
"""

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch.utils.flop_counter import FlopCounterMode

from trainer.data.plan import Plan
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
"""Dense bf16 TFLOP/s by the makers' data sheets, without sparsity, by what a device's name contains."""


@dataclass(frozen=True)
class Peak:
    """Operations a second that one device can do, and where the number comes from."""

    flops_per_s: float
    source: str


@dataclass(frozen=True)
class Gauge:
    """What turns images a second into MFU. `flops_per_image`: forward and backward; `world`: devices."""

    flops_per_image: float
    peak: Peak
    world: int
    device: torch.device

    def mfu(self, images_per_s: float) -> float:
        """Share of all devices' peak, 0 to 1."""
        return images_per_s * self.flops_per_image / (self.peak.flops_per_s * self.world)

    def memory_gib(self) -> float:
        """Most memory that this process had so far, GiB: allocated by torch on a GPU, resident on a CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**30
        lines = Path("/proc/self/status").read_text().splitlines()
        [kib] = [line.split()[1] for line in lines if line.startswith("VmHWM:")]
        return int(kib) / 2**20


def make_gauge(plan: Plan, ranks: Ranks) -> Gauge:
    """The gauge of a run on these ranks' devices, whose peak it tells."""
    config = plan.config
    flops = training_flops(config.model, plan.samples.latent_shape, config.train.context_tokens)
    peak = peak_of(ranks.device, config.train.precision)
    able = f"{peak.flops_per_s / TERA:,.3f} TFLOP/s a rank ({peak.source})"
    log.info(f"MFU counts {flops / 1e9:,.2f} GFLOP an image against {able}")
    return Gauge(flops, peak, ranks.world, ranks.device)


def training_flops(config: ModelConfig, latent_shape: tuple[int, int, int], k: int) -> float:
    """Operations of one image's forward pass, times 3 for the backward pass. k: tokens of the context."""
    with torch.device("meta"):
        unet = build_unet(config)
        inputs = (torch.empty(1, *latent_shape), torch.empty(1), torch.empty(1, k, config.context_dim))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        unet(*inputs)
    return 3.0 * counter.get_total_flops()


def peak_of(device: torch.device, precision: Literal["fp32", "bf16"]) -> Peak:
    """The peak of a device in the number format of a run: from the table, else measured."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    if precision == "bf16" and (known := known_peak(name)):
        return Peak(known, f"{name}, data sheet")
    return Peak(_matmul_rate(device, precision), f"{name}, {precision} matrix product measured")


def known_peak(name: str) -> float | None:
    """Dense bf16 operations a second of a device by name, or None."""
    words = name.split()
    found = [key for key in PEAK_TFLOPS if _stands_in(key.split(), words)]
    return PEAK_TFLOPS[max(found, key=len)] * TERA if found else None


def _stands_in(key: list[str], words: list[str]) -> bool:
    """True if all words of a key are among a name's, as themselves or before a dash (A100-SXM4-80GB)."""
    return all(any(word == part or word.startswith(f"{part}-") for word in words) for part in key)


def _matmul_rate(device: torch.device, precision: Literal["fp32", "bf16"]) -> float:
    """The best of a few square matrix products, operations a second."""
    edge = 8192 if device.type == "cuda" else 768
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    # random numbers: a GPU multiplies ones with less power, hence faster
    generator = torch.Generator(device).manual_seed(0)
    factors = torch.rand(2, edge, edge, device=device, generator=generator).to(dtype)
    return max(2 * edge**3 / _seconds_of_product(*factors) for _ in range(5))


def _seconds_of_product(one: torch.Tensor, other: torch.Tensor) -> float:
    began = time.perf_counter()
    product = one @ other
    product[0, 0].item()  # waits for a GPU
    return time.perf_counter() - began
