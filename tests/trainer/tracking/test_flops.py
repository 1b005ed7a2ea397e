import mmap
import tomllib
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from pipeline.runtime.memory import reset_peak
from trainer.model.recipe import ModelConfig
from trainer.tracking.flops import UtilizationMeter, known_peak, training_flops

RECIPES = Path(__file__).parents[3] / "jobs" / "configs"


# GFLOP of the forward pass of one image, counted from the shapes of the reference implementation.
@pytest.mark.parametrize(
    ("name", "shape", "k", "gflop"),
    [
        ("train_laion_256", (16, 16, 16), 8, 72.2),
        ("train_laion_512", (16, 32, 32), 8, 295.5),
        ("train_laion_768", (16, 48, 48), 8, 694.4),
        ("train_imagenet", (3, 64, 64), 4, 208.6),
    ],
)
def test_flops_of_the_papers_models_equal_reference_counts(
    name: str, shape: tuple[int, int, int], k: int, gflop: float
) -> None:
    sections = tomllib.loads((RECIPES / f"{name}.toml").read_text())
    model = ModelConfig.model_validate(sections["model"])
    assert training_flops(model, shape, k) == pytest.approx(3e9 * gflop, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA L4", 121),
        ("NVIDIA L40", 181),
        ("NVIDIA L40S", 362),
        ("NVIDIA RTX 6000 Ada Generation", 364),
        ("NVIDIA GeForce RTX 4090", 165.2),
    ],
)
def test_device_names_of_torch_are_in_the_table(name: str, tflops: float) -> None:
    assert known_peak(name) == tflops * 1e12


@pytest.mark.parametrize("name", ["Quadro RTX 6000", "NVIDIA A10", "NVIDIA A1000", "Tesla V100-SXM2-16GB", "CPU"])
def test_a_device_that_is_not_in_the_table_has_no_known_peak(name: str) -> None:
    assert known_peak(name) is None


def test_mfu_is_relative_to_all_devices_and_unknown_devices_have_none() -> None:
    meter = UtilizationMeter(2e9, 1e12, world=4, device=torch.device("cpu"))
    assert meter.mfu(100) == pytest.approx(100 * 2e9 / 4e12)
    assert UtilizationMeter(2e9, known_peak("CPU"), world=4, device=torch.device("cpu")).mfu(100) is None


def test_memory_is_the_peak_resident_memory() -> None:
    meter = UtilizationMeter(1, None, 1, torch.device("cpu"))
    reset_peak()
    before = meter.memory_gib()
    # Map, write and unmap memory up to 256 MiB more than the peak, which may be that of an earlier test. Not from the
    # heap, which may hold pages that earlier tests have freed and the system still counts. The system may take some
    # pages of libraries back meanwhile.
    count = int(before * 2**30) - psutil.Process().memory_info().rss + 2**28
    with mmap.mmap(-1, count) as memory:
        np.frombuffer(memory, np.uint8)[:] = 1
    assert meter.memory_gib() > before + 2**26 / 2**30
