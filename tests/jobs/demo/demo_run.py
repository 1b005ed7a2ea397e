"""A finished demo run of minimal size: every table, sample and number that the report reads.

It has twelve metadata rows: six training images, five database images, and one dropped row. Image t0 has a
near copy in the database (d0), which the neighbor table leaves out.
"""

import hashlib
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from jobs.demo.judge.labels import CLASSES
from jobs.demo.judge.links import LINKS
from jobs.demo.report.numbers import Demo
from pipeline.recipe import NeighborsConfig
from retrieval.recipe import ClipConfig
from retrieval.storage import schema
from retrieval.storage.manifest import Manifest, ShardRecord, write_manifest
from retrieval.storage.root import Root
from trainer.evaluation.charts import LABELS

DIM, K, NEAR_COPY = 8, 2, 0.96
SHARD = "00000-00000"
TRAIN = tuple(f"t{i}" for i in range(6))
DATABASE = tuple(f"d{i}" for i in range(5))
STYLES = ("deep red", "green")
PROMPTS = ("a circle", "two squares")
HOSTILE = "</p><script>alert('captions')</script><img src=x onerror=alert(1)>"
NEIGHBORS = schema.neighbors(K, DIM)


def url_of(name: str) -> str:
    return f"http://127.0.0.1:1/images/{name}.jpg"


def id_of(name: str) -> int:
    return schema.image_id(url_of(name))


def vector_of(name: str) -> np.ndarray:
    """A unit vector. Those of d0 and t0 are nearly equal."""
    rng = np.random.default_rng([5, *(b"t0" if name == "d0" else name.encode())])
    vector = rng.standard_normal(DIM) + (0.01 if name == "d0" else 0)
    return (vector / np.linalg.norm(vector)).astype(np.float16)


def nearest(name: str) -> list[str]:
    """The K most similar database rows without copies, by sorting."""
    pairs = []
    for other in DATABASE:
        a, b = vector_of(name).astype(float), vector_of(other).astype(float)
        similarity = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
        if similarity < NEAR_COPY:
            pairs.append((similarity, other))
    return [other for _, other in sorted(pairs, reverse=True)[:K]]


def jpeg(seed: int, edge: int = 32) -> bytes:
    color = tuple(int(c) for c in np.random.default_rng([8, seed]).integers(0, 255, 3))
    buffer = io.BytesIO()
    Image.new("RGB", (edge, edge), color).save(buffer, "JPEG")
    return buffer.getvalue()


def edit(root: Root, name: str, table_schema: pa.Schema, change: Callable[[list[dict[str, Any]]], Any]) -> None:
    """Rewrite a table after `change` has edited the list of its rows."""
    rows = schema.read_table(root, name, table_schema).to_pylist()
    change(rows)
    schema.write_table(root, name, pa.Table.from_pylist(rows, table_schema), table_schema)


def write_demo(folder: Path, clip: ClipConfig | None = None) -> Demo:
    """Write the run below a folder."""
    root = Root(folder)
    _write_world(folder / "world")
    for split, names in (("train", TRAIN), ("database", DATABASE)):
        _write_selected(root, split, names)
        _write_downloaded(root, split, names)
        _write_embedded(root, split, names)
    _write_neighbors(root)
    _write_manifests(root)
    _write_run(root)
    _stage(root, "judge", [], {"links": links()})
    config = NeighborsConfig(k=K, near_copy_similarity=NEAR_COPY)
    return Demo(root, root.child("world"), root.child("world/metadata"), clip or ClipConfig(model="x"), config, "tiny")


def _write_world(world: Path) -> None:
    (world / "metadata").mkdir(parents=True)
    urls = [url_of(name) for name in (*TRAIN, *DATABASE)] + ["ftp://nowhere"]
    for number, part in enumerate((urls[:7], urls[7:])):
        pq.write_table(pa.table({"URL": part}), world / f"metadata/part-{number:05d}.parquet")
    scenes = [0, 1, 2, 3, 4, 5, 0, 7, 8, 9, 10, None]
    truth = {"url": urls, "scene_uid": pa.array(scenes, pa.int64())}
    pq.write_table(pa.table(truth), world / "truth.parquet")
    for style in STYLES:
        (world / "styles" / style).mkdir(parents=True)
        for i in range(K):
            (world / "styles" / style / f"{i:05d}.jpg").write_bytes(jpeg(i))
    (world / "held_out").mkdir()
    for i in range(12):
        (world / f"held_out/{i:05d}.jpg").write_bytes(jpeg(100 + i))
    gallery = {
        "path": [f"held_out/{i:05d}.jpg" for i in range(12)],
        "caption": [f"picture number {i}" for i in range(12)],
        "prompt": [*PROMPTS, *[f"prompt {i}" for i in range(10)]],
    }
    pq.write_table(pa.table(gallery), world / "held_out.parquet")


def _shown(name: str) -> dict[str, Any]:
    caption = HOSTILE if name.startswith("d") else f"a picture called {name}"
    return {schema.IMAGE_ID: id_of(name), "url": url_of(name), "caption": caption, "license": None}


def _write_selected(root: Root, split: str, names: tuple[str, ...]) -> None:
    rows = [{**_shown(name), "width": 32, "height": 32} for name in names]
    table = pa.Table.from_pylist(rows, schema.SELECTED)
    schema.write_table(root, f"filter/{split}/{SHARD}.parquet", table, schema.SELECTED)


def _write_downloaded(root: Root, split: str, names: tuple[str, ...]) -> None:
    """All images are stored except t5, which has the reason not_found."""
    rows = []
    tar_path = root.local_path(f"download/{split}/{SHARD}.tar")
    tar_path.parent.mkdir(parents=True)
    sizes = ("width", "height", "original_width", "original_height")
    with tarfile.open(tar_path, "w") as tar:
        for number, name in enumerate(names):
            row = {**_shown(name), "reason": "not_found", "message": "", "sha256": "", "phash": 0} | dict.fromkeys(
                sizes, 0
            )
            if name != "t5":
                data = jpeg(number + 50 * (split == "train"))
                row |= {"reason": "", "sha256": hashlib.sha256(data).hexdigest()}
                member = tarfile.TarInfo(f"{id_of(name) & (1 << 64) - 1:016x}.jpg")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
            rows.append(row)
    table = pa.Table.from_pylist(rows, schema.DOWNLOADED)
    schema.write_table(root, f"download/{split}/{SHARD}.parquet", table, schema.DOWNLOADED)


def _write_embedded(root: Root, split: str, names: tuple[str, ...]) -> None:
    stored = [name for name in names if name != "t5"]
    rows = [{**_shown(name), "width": 32, "height": 32, schema.EMBEDDING: vector_of(name)} for name in stored]
    table_schema = schema.embeddings(DIM)
    schema.write_table(root, f"embed/{split}/{SHARD}.parquet", pa.Table.from_pylist(rows, table_schema), table_schema)


def _write_neighbors(root: Root) -> None:
    rows = []
    for name in TRAIN[:5]:
        neighbors = nearest(name)
        vectors = [vector_of(other) for other in neighbors]
        similarities = [float(vector_of(name).astype(np.float32) @ vector.astype(np.float32)) for vector in vectors]
        rows.append(
            {
                schema.IMAGE_ID: id_of(name),
                schema.NEIGHBOR_IDS: [id_of(other) for other in neighbors],
                schema.SIMILARITIES: similarities,
                schema.NEIGHBOR_EMBEDDINGS: np.concatenate(vectors),
                schema.NEIGHBOR_NORMS: [1.0] * K,
            }
        )
    table = pa.Table.from_pylist(rows, NEIGHBORS)
    schema.write_table(root, f"neighbors/{SHARD}.parquet", table, NEIGHBORS)


def _stage(root: Root, stage: str, shards: list[ShardRecord], values: dict[str, Any]) -> None:
    write_manifest(root, Manifest(stage, 1, stage, {}, {}, tuple(shards), values, seconds=1.5))


def _write_manifests(root: Root) -> None:
    encoder = {"model": "test", "weights": "0" * 16, "preprocessing": "{}", "dim": DIM}
    _stage(root, "filter", [ShardRecord("dropped/00000", 0, (), {"bad_url": 1})], {})
    _stage(root, "download", [ShardRecord(f"train/{SHARD}", 5, (), {"not_found": 1})], {})
    _stage(root, "embed", [], {"encoder": encoder})
    _stage(root, "index", [ShardRecord("partitions/00000", len(DATABASE), ())], {})
    _stage(root, "neighbors", [], {"recall": 1.0, "near_copies": 1})


def _write_run(root: Root) -> None:
    columns = [style.replace(" ", "_") for style in STYLES]
    for column in columns:
        neighbors = [
            {"image_id": i, "similarity": 0.5 - 0.1 * i, "url": f"{column}/{i:05d}.jpg", "caption": HOSTILE}
            for i in range(K)
        ]
        for number, prompt in enumerate(PROMPTS):
            path = f"runs/tiny/sample/{column}/{number:04d}-00"
            root.write_bytes(f"{path}.png", jpeg(number))
            root.write_json(f"{path}.json", {"prompt": prompt, "mode": "text_and_neighbors", "neighbors": neighbors})
    _stage(root, "runs/tiny/sample", [], {"prompts": list(PROMPTS), "columns": columns})
    trained = {"steps": 20, "images": 80, "loss": 0.5, "seconds_per_step": 0.1}
    _stage(root, "runs/tiny/train", [], trained)
    settings = {"k": K}
    write_manifest(root, Manifest("runs/tiny/evaluate", 1, "evaluate", {}, settings, (), {}, seconds=1.5))
    rest = {"grad_norm": 1.0, "learning_rate": 1e-3, "images_per_s": 1.0}
    rest |= {"seconds_per_step": 0.1, "waiting_s": 0.0, "paused_s": 0.0, "mfu": 0.5, "memory_gib": 1.0}
    rest |= {"loss_by_quartile": [1.0, 1.0, 1.0, None], "global_batch": 4, "weight_decay": 0.01, "max_grad_norm": 1.0}
    rest |= {"ema_decay": 0.9999, "images": 80, "skipped_steps": 0, "replaced_images": 0}
    lines = [json.dumps({"step": step, "loss": 10 / step, **rest}) for step in range(1, 21)]
    root.write_bytes("runs/tiny/train/metrics.jsonl", "".join(f"{line}\n" for line in lines).encode())
    root.write_json("runs/tiny/evaluate/evaluation.json", evaluation(columns))


def links() -> dict[str, dict[str, list[float]]]:
    """Output of the step `judge` for a run that loses nothing; a sample without neighbors has no style."""
    shares = {name: [0.98, 0.96, 0.99] for name in CLASSES}
    plain = {name: share for name, share in shares.items() if name != "style"}
    return {link: plain if link == "samples_no_neighbors" else shares for link in LINKS}


def evaluation(columns: list[str]) -> dict[str, Any]:
    """Output of `evaluate` for a run in which only retrieval changes the style."""

    def estimate(value: float) -> list[float]:
        return [value, value - 0.05, value + 0.05]

    def results(accuracy: float) -> dict[str, Any]:
        others = {"logit": estimate(2.0), "clip_score": estimate(0.5), "kernel_distance": estimate(0.3)}
        others["content_and_style"] = estimate(1.5)
        accuracies = {"accuracy": estimate(accuracy), "accuracy_pixels": estimate(accuracy - 0.02)}
        accuracies["accuracy_nearest"] = estimate(accuracy - 0.01)
        return {"samples": 70, "prompts": 60, **accuracies, **others}

    rates = dict(zip(LABELS, (0.9, 0.2, 0.3, 0.1), strict=True))
    modes = {mode: results(rate) for mode, rate in rates.items()}
    effect = {mode: estimate(rates["retrieval"] - rate) for mode, rate in rates.items() if mode != "retrieval"}
    judge = {"accuracy": estimate(0.94), "held_out_rows": 100}
    return {
        "styles": [{"style": column, "modes": modes} for column in columns],
        "modes": modes,
        "chance": 0.1,
        "num_styles": 10,
        "judges": {"clip": judge, "pixels": judge, "descriptor": {"retrieval": estimate(0.97), "gallery_rows": 200}},
        "effect": effect,
        "effect_pixels": effect,
    }
