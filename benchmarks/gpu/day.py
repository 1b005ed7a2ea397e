"""What the rows share: the device, clocks, tiny and full networks, and inputs that are written once per machine."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

Values = dict[str, Any]
"""The values of a case, ready for JSON."""
Cases = dict[str, Callable[[], Values]]


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


def profile(work: Callable[[], object], rows: int = 15) -> list[list[Any]]:
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
        for event in events[:rows]
    ]


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
    from safetensors.torch import save_file

    from retrieval.clip.encoder import Encoder
    from retrieval.recipe import ClipConfig

    folder = day.scratch / "clip"
    if not (folder / "open_clip_config.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        model_config = TINY_CLIP if day.tiny else open_clip.get_model_config("ViT-L-14-quickgelu")
        torch.manual_seed(0)
        settings = {name: value for name, value in model_config.items() if name != "custom_text"}
        weights = open_clip.model.CLIP(**settings).state_dict()
        save_file(
            {name: tensor.contiguous() for name, tensor in weights.items()}, folder / "open_clip_model.safetensors"
        )
        preprocessing = {"size": model_config["vision_cfg"]["image_size"]}
        description = {"model_cfg": model_config, "preprocess_cfg": preprocessing}
        (folder / "open_clip_config.json").write_text(json.dumps(description))
    return Encoder(ClipConfig(model=f"local-dir:{folder}"), device, precision)  # type: ignore[arg-type]


TINY_CLIP: Values = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
