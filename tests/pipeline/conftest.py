"""A small finished `download`, a CLIP model with random weights, and a server with scripted responses."""

import io
import json
import tarfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import open_clip
import pyarrow as pa
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from retrieval import Root
from retrieval.recipe import ClipConfig
from retrieval.storage import schema
from retrieval.storage.manifest import Manifest, ShardRecord, write_manifest
from tests.pipeline.scripted_server import ScriptedServer
from tests.pipeline.shards_in_process import shards_in_process
from tests.pipeline.web.fetching import FakeClock

ARCHITECTURE = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


def write_clip(folder: Path, seed: int) -> ClipConfig:
    """Write a tiny open_clip model with random weights in open_clip's folder layout.

    The image features are centered: otherwise those of all pictures would be nearly equal.
    """
    folder.mkdir(parents=True)
    torch.manual_seed(seed)
    model = open_clip.CLIP(**ARCHITECTURE)
    blocks = torch.nn.functional.interpolate(2 * torch.randn(256, 3, 4, 4), 32)
    with torch.no_grad():
        model.train().encode_image(blocks)  # batch statistics
        model.eval().visual.attnpool.c_proj.bias -= model.encode_image(blocks).mean(dim=0)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": ARCHITECTURE}))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return ClipConfig(model=f"local-dir:{folder}")


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> ClipConfig:
    """The encoder of the pipeline tests."""
    return write_clip(tmp_path_factory.mktemp("clip") / "model", seed=0)


@pytest.fixture(scope="module")
def in_process_shards() -> Iterator[None]:
    """The stages of a test module run their shards in the test process."""
    with shards_in_process():
        yield


@dataclass(frozen=True)
class Picture:
    """One downloaded row. Its content depends on `seed`, unless `data` is set; with a reason it failed."""

    url: str
    seed: int
    reason: str = ""
    data: bytes | None = None
    phash: int = 0
    checksum: str | None = None

    @property
    def jpeg(self) -> bytes:
        """`data`, or colored blocks: equal seeds give equal bytes."""
        if self.data is not None:
            return self.data
        blocks = np.random.default_rng(self.seed).integers(0, 255, (4, 4, 3), np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(blocks).resize((48, 48), Image.Resampling.NEAREST).save(buffer, "JPEG", quality=90)
        return buffer.getvalue()


def write_download(root: Root, shards: dict[str, list[Picture]]) -> None:
    """Write the tars, status tables and manifest of a finished `download`."""
    records = []
    for shard, pictures in shards.items():
        rows = [_row(picture) for picture in pictures]
        table = pa.Table.from_pylist(rows, schema=schema.DOWNLOADED)
        files = [schema.write_table(root, f"download/{shard}.parquet", table, schema.DOWNLOADED)]
        with root.writing(f"download/{shard}.tar") as pending, tarfile.open(pending.path, "w") as tar:
            for row, picture in zip(rows, pictures):
                if not picture.reason:
                    info = tarfile.TarInfo(f"{row['image_id'] & (1 << 64) - 1:016x}.jpg")
                    info.size = len(picture.jpeg)
                    tar.addfile(info, io.BytesIO(picture.jpeg))
        kept = sum(not picture.reason for picture in pictures)
        records.append(ShardRecord(shard, kept, (*files, pending.record)))
    write_manifest(root, Manifest("download", 1, "d" * 16, {}, {}, tuple(records), {}, 1.0))


def _row(picture: Picture) -> dict[str, object]:
    stored = not picture.reason
    return {
        "image_id": schema.image_id(picture.url),
        "url": picture.url,
        "caption": f"caption of {picture.url}",
        "license": None,
        "checksum": picture.checksum,
        "similarity": picture.seed / 1000,
        "aesthetic": picture.seed % 10,
        "language": "en" if picture.seed % 2 else None,
        "reason": picture.reason,
        "message": picture.reason,
        "width": 48 * stored,
        "height": 48 * stored,
        "original_width": 48 * stored,
        "original_height": 48 * stored,
        "sha256": f"{picture.seed:064x}" if stored else "",
        "phash": picture.phash if stored else 0,
    }


def pictures(prefix: str, first_seed: int, count: int) -> list[Picture]:
    """Pictures with consecutive seeds."""
    return [Picture(f"http://example.org/{prefix}/{i}.jpg", i << 200) for i in range(first_seed, first_seed + count)]


@pytest.fixture
def fetching_clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    """A clock for a queue that is also the clock of fetchers and of the deadlines of their sockets."""
    clock = FakeClock()
    for module in ("fetch", "sockets"):
        monkeypatch.setattr(f"pipeline.web.{module}.time", SimpleNamespace(monotonic=clock.now, time=time.time))
    return clock


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    server = ScriptedServer()
    yield server
    server.close()
