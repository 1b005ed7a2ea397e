"""What the rows share: the device, clocks, tiny and full networks, and inputs that are written once per machine."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.report import REPOSITORY

Values = dict[str, Any]
"""The values of a case, ready for JSON."""
Cases = dict[str, Callable[[], Values]]
PROFILED = 15
"""Operators of a profile."""


@dataclass(frozen=True)
class Day:
    """The settings of a row. earlier: values of its finished cases by name."""

    tiny: bool
    scratch: Path
    earlier: dict[str, Values]
    seconds: float = 60.0
    """Time of the row, from the start of its process."""

    @property
    def device(self) -> torch.device:
        """The GPU; with `tiny` the CPU if there is none."""
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(work: Callable[[], object], times: int, warm_up: int = 2) -> float:
    """Mean seconds of `times` calls, after the warm-up calls."""
    for _ in range(warm_up):
        work()
    synchronize()
    start = time.perf_counter()
    for _ in range(times):
        work()
    synchronize()
    return (time.perf_counter() - start) / times


def free_memory() -> None:
    """Return unused memory to the GPU and start a new measurement of the peak."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def memory_gib() -> float:
    """Peak of the memory allocated on the GPU, GiB; 0 without a GPU."""
    return round(torch.cuda.max_memory_allocated() / 2**30, 2) if torch.cuda.is_available() else 0.0


def matrix_product(day: Day) -> float:
    """The best rate of a bf16 matrix product over several shapes, FLOP/s."""
    best = 0.0
    for edge in (128,) if day.tiny else (8192, 12288):
        left, right = torch.randn(2, edge, edge, device=day.device, dtype=torch.bfloat16)
        best = max(best, 2 * edge**3 / timed(lambda left=left, right=right: left @ right, 20))
    return best


def profile(work: Callable[[], object]) -> list[list[Any]]:
    """The operators with the most time on the device in one call: name, calls, milliseconds, share."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    work()
    on_gpu = torch.cuda.is_available()
    with record(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as profiler:
        work()
        synchronize()
    unit = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    events = sorted(profiler.key_averages(), key=lambda event: -getattr(event, unit))
    total = sum(getattr(event, unit) for event in events) or 1.0
    return [
        [event.key[:80], event.count, round(getattr(event, unit) / 1000, 3), round(getattr(event, unit) / total, 4)]
        for event in events[:PROFILED]
    ]


def run_command(command: str, recipe: Path, settings: Mapping[str, object], on_cpu: bool = False) -> None:
    """Run `python -m jobs.<command>` with changed settings of a recipe. Raises RuntimeError with the end of its log."""
    texts = {key: str(value).lower() if isinstance(value, bool) else str(value) for key, value in settings.items()}
    words = [word for key, text in texts.items() for word in ("--set", f"{key}={text}")]
    hidden = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"} if on_cpu else {}
    process = subprocess.run(
        [sys.executable, "-m", f"jobs.{command}", str(recipe), *words],
        cwd=REPOSITORY,
        env={**os.environ, **hidden},
        capture_output=True,
        text=True,
        check=False,
    )
    if process.returncode:
        raise RuntimeError(f"{command} ended with code {process.returncode}: {process.stderr[-2000:]}")


def training_stage(day: Day, size: int) -> Any:
    """The paper's training at a size (`benchmarks.training.schedule.Stage`), or a tiny one."""
    from benchmarks.training.schedule import stages

    [stage] = [stage for stage in stages() if stage.name == f"train_laion_{size}"]
    if not day.tiny:
        return stage
    model = stage.model.model_copy(
        update={"latent_channels": 4, "context_dim": 16, "channels": (32, 64), "layers": 1, "attention": (1, 2)}
    )
    return replace(stage, model=model, latent_shape=(4, 4, 4), train=stage.train.model_copy(update={"k": 2}))


def autoencoder_folder(day: Day) -> Path:
    """A KL-f16 autoencoder with random weights, written once."""
    from trainer.model.autoencoder import kl_f16

    folder = day.scratch / "kl-f16"
    if not (folder / "config.json").exists():
        torch.manual_seed(0)
        network = kl_f16(8, 4, 4) if day.tiny else kl_f16()
        network.save_pretrained(folder)
    return folder


def encoder(day: Day, device: str, precision: str) -> Any:
    """ViT-L/14 with random weights as `retrieval.clip.encoder.Encoder`, from a folder that is written once."""
    import open_clip

    from benchmarks.common.random_clip import write_random_clip
    from retrieval.clip.encoder import Encoder
    from retrieval.recipe import ClipConfig

    architecture = TINY_CLIP if day.tiny else open_clip.get_model_config("ViT-L-14-quickgelu")
    model = write_random_clip(day.scratch / "clip", architecture)
    return Encoder(ClipConfig(model=model), device, precision)  # type: ignore[arg-type]


TINY_CLIP: Values = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
