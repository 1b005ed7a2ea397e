"""Row 4: CLIP vectors of JPEG pictures in tars by the code of the embed stage, with ViT-L/14 with random weights."""

import io
import os
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch

from benchmarks.gpu.day import Cases, Day, Values, encoder, free_memory, memory_gib, profile, synchronize, timed

AIM_IMAGES_PER_S = 2000
AIM_SHARE = 0.9
"""Of the bare forward pass."""
EDGE = 256
"""Shorter edge of the pictures is 1 to 2 times this, as after the download of database pictures."""


def cases(day: Day) -> Cases:
    return {
        "bare forward": lambda: bare(day),
        "from a tar": lambda: from_tars(day, shards_at_once=1),
        "from two tars at once": lambda: from_tars(day, shards_at_once=2),
        "profile": lambda: {"profile": profile(partial(_embed, day, encoder(day, str(day.device), "bf16")))},
    }


def bare(day: Day) -> Values:
    """The forward pass on pixels that are on the device."""
    model, batch = encoder(day, str(day.device), "bf16"), _batch_size(day)
    edge = 32 if day.tiny else 224
    pixels = torch.rand(batch, 3, edge, edge, device=day.device)

    @torch.inference_mode()
    def forward() -> torch.Tensor:
        with torch.autocast(day.device.type, torch.bfloat16):
            return model._model.encode_image(pixels)

    free_memory()
    rate = batch / timed(forward, 1 if day.tiny else 20)
    return {"images_per_s": round(rate, 1), "batch": batch, "aim": AIM_IMAGES_PER_S, "memory_gib": memory_gib()}


def from_tars(day: Day, shards_at_once: int) -> Values:
    """Decoding, resizing and the forward pass; as many shards at once as a worker of the stage has."""
    model = encoder(day, str(day.device), "bf16")
    work = partial(_embed, day, model)
    work()
    free_memory()
    began = time.perf_counter()
    with ThreadPoolExecutor(shards_at_once) as pool:
        images = sum(pool.map(lambda _: work(), range(shards_at_once)))
    synchronize()
    rate = images / (time.perf_counter() - began)
    forward = day.earlier.get("bare forward", {}).get("images_per_s")
    share = round(rate / forward, 4) if forward else None
    values = {"images_per_s": round(rate, 1), "images": images, "cpus": os.cpu_count(), "share_of_forward": share}
    return {**values, "aim": AIM_IMAGES_PER_S, "memory_gib": memory_gib()}


def _batch_size(day: Day) -> int:
    return 4 if day.tiny else 256


def _embed(day: Day, model: object) -> int:
    """Embed all pictures of a tar. Returns their number."""
    from pipeline.pictures.embedding import embed_images, read_pictures
    from pipeline.recipe import EmbedConfig

    tar, keys = _tar(day)
    config = EmbedConfig(
        batch_size=_batch_size(day), decode_threads=2 if day.tiny else max(2, (os.cpu_count() or 2) - 1)
    )
    ids, _ = embed_images(read_pictures(str(tar), set(keys)), model, config)  # type: ignore[arg-type]
    return len(ids)


def _tar(day: Day) -> tuple[Path, list[str]]:
    """A tar of generated JPEG pictures, written once, and the keys of its members."""
    from benchmarks.training.training_data import PICTURES, picture

    path, count = day.scratch / "pictures.tar", 16 if day.tiny else 8192
    keys = [f"{number:016x}" for number in range(count)]
    if not path.exists():
        pictures = [picture(number, EDGE) for number in range(min(count, PICTURES))]
        with tarfile.open(path, "w") as tar:
            for number, key in enumerate(keys):
                data = pictures[number % len(pictures)]
                member = tarfile.TarInfo(f"{key}.jpg")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return path, keys
