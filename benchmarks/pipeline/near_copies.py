"""`make bench-near-copies`: recall of near-copy removal on modified copies, and its false removals.

Reads RECIPE's [clip] and thresholds; draws the demo's scenes, and with `--pictures` reads a folder. Half of
the pictures are training images. Modified copies of these should be removed, by perceptual hash, by
embedding, or by either; the other half should not. Writes `docs/near_copies.json` and `docs/near_copies.md`.
"""

import io
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps
from tqdm import tqdm

from benchmarks.common.on_recipe import recipe_benchmark_parser, report_on_recipe
from jobs.cli.recipe import Recipe
from jobs.demo.world.scenes import draw, random_scene
from jobs.reporting.hardware import hardware
from jobs.reporting.tables import markdown_table
from pipeline.pictures.near_copy_shards import ROWS_PER_GROUP
from pipeline.pictures.picture import prepare
from pipeline.recipe import EmbedConfig, NeighborsConfig
from retrieval.clip.encoder import Encoder
from retrieval.errors import UserError
from retrieval.perceptual_hash import PerceptualHashIndex, perceptual_hash
from retrieval.pictures.decode import MAX_PIXELS, PictureError
from retrieval.recipe import ClipConfig

EDGE = 256
HASHES = 1_000_000
"""Number of random hashes that are compared with ROWS_PER_GROUP others, as many as `embed` compares at a time."""

Features = tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]
"""Perceptual hashes (n,) and unit vectors (n, dim) of n pictures."""

PAGE = """# Near copies

`make bench-near-copies RECIPE=...`, on {hardware}. A database picture is removed if its perceptual hash (64
bits) differs from that of a training picture or its mirror in at most {bits} bits, or if the cosine
similarity of its embedding to one is at least {similarity}. `make embed` removes pictures by hash from the
database; `make neighbors` excludes pictures by embedding from the neighbors of one training image.
{data_sets}
Hashing a decoded {edge} px picture takes {hash_ms:.2f} ms of CPU time. Comparing {hashes:,} random hashes with
{group:,} others, mirrors included, took {compare_s:.1f} s of CPU time, which grows with the product of the
numbers: {pair_ps:.1f} ps a pair. `make capacity` counts with it.
"""
DATA_SET = """
## {name}

{originals:,} training pictures with one copy of each kind; {others:,} other pictures.

{table}
"""


def _jpeg(image: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer)


def _scaled(image: Image.Image, factor: float) -> Image.Image:
    size = max(32, round(image.width * factor)), max(32, round(image.height * factor))
    return image.resize(size, Image.Resampling.LANCZOS)


def _cropped(image: Image.Image, share: float, rng: np.random.Generator) -> Image.Image:
    """Crop a share of the width and of the height, at a random position."""
    width, height = round(image.width * (1 - share)), round(image.height * (1 - share))
    left, top = rng.integers(image.width - width + 1), rng.integers(image.height - height + 1)
    return image.crop((int(left), int(top), int(left) + width, int(top) + height))


Modification = Callable[[Image.Image, np.random.Generator], Image.Image]
MODIFICATIONS: dict[str, Modification] = {
    "resized to 40 %": lambda image, _: _scaled(image, 0.4),
    "recompressed, quality 40": lambda image, _: _jpeg(image, 40),
    "resized and recompressed": lambda image, _: _jpeg(_scaled(image, 0.5), 60),
    "mirrored": lambda image, _: _jpeg(ImageOps.mirror(image), 85),
    "cropped by 5 %": lambda image, rng: _jpeg(_cropped(image, 0.05, rng), 85),
    "cropped by 10 %": lambda image, rng: _jpeg(_cropped(image, 0.1, rng), 85),
    "cropped by 20 %": lambda image, rng: _jpeg(_cropped(image, 0.2, rng), 85),
}


def scenes(count: int) -> Iterator[Image.Image]:
    """Pictures of the demo."""
    for number in range(count):
        yield Image.fromarray(draw(random_scene(np.random.default_rng([11, number])), EDGE, EDGE))


def pictures_in(folder: Path) -> Iterator[Image.Image]:
    """The usable pictures of a folder, resized as the stage `download` stores database pictures."""
    for path in sorted(folder.rglob("*.jpg")):
        try:
            picture = prepare(path.read_bytes(), MAX_PIXELS, EDGE)
        except PictureError:
            continue
        image = Image.open(io.BytesIO(picture.data)).convert("RGB")
        yield _scaled(image, EDGE / min(image.size))


def features_of(images: list[Image.Image], encoder: Encoder) -> Features:
    """Perceptual hashes and embeddings of pictures."""
    return np.array([perceptual_hash(image) for image in images], np.int64), encoder.encode_images(images)


def removed_shares(candidates: Features, train: Features, max_bits: int, min_similarity: float) -> dict[str, float]:
    """The share of candidates that each criterion removes."""
    by_hash = PerceptualHashIndex(train[0]).contains_near(candidates[0], max_bits)
    by_embedding = (candidates[1] @ train[1].T).max(axis=1) >= min_similarity
    removed = {"hash": by_hash, "embedding": by_embedding, "either": by_hash | by_embedding}
    return {criterion: float(mask.mean()) for criterion, mask in removed.items()}


def measure_pictures(
    name: str, images: list[Image.Image], encoder: Encoder, thresholds: tuple[int, float]
) -> dict[str, Any]:
    """Shares of removed copies and of other pictures. Every second picture is a training image."""
    train, others = images[::2], images[1::2]
    train_features = features_of(train, encoder)
    recall = {}
    for number, (kind, modify) in enumerate(tqdm(MODIFICATIONS.items(), desc=name)):
        copies = [modify(image, np.random.default_rng([number, row])) for row, image in enumerate(train)]
        recall[kind] = removed_shares(features_of(copies, encoder), train_features, *thresholds)
    false = removed_shares(features_of(others, encoder), train_features, *thresholds)
    return {"name": name, "originals": len(train), "others": len(others), "recall": recall, "false": false}


def measure_time() -> dict[str, float]:
    """CPU milliseconds to hash one picture, CPU seconds to compare HASHES with a group, and CPU picoseconds a pair."""
    [image] = scenes(1)
    start = time.process_time()
    for _ in range(100):
        perceptual_hash(image)
    hash_ms = 10 * (time.process_time() - start)
    rng = np.random.default_rng(0)
    train, candidates = (rng.integers(1, 1 << 63, count) for count in (ROWS_PER_GROUP, HASHES))
    start = time.process_time()
    PerceptualHashIndex(train).contains_near(candidates, 6)
    compare_s = time.process_time() - start
    return {"hash_ms": hash_ms, "compare_s": compare_s, "pair_ps": 1e12 * compare_s / (ROWS_PER_GROUP * HASHES)}


def measure(recipe: Recipe, count: int, folder: Path | None) -> dict[str, Any]:
    """Measure all sets of pictures, with the thresholds of a recipe."""
    bits, similarity = recipe[EmbedConfig].near_copy_bits, recipe[NeighborsConfig].near_copy_similarity
    encoder = Encoder(recipe[ClipConfig])
    data_sets = [measure_pictures("Drawn scenes", list(scenes(2 * count)), encoder, (bits, similarity))]
    if folder:
        images = list(pictures_in(folder))
        if len(images) < 2:
            raise UserError(f"--pictures {folder} has {len(images)} usable .jpg files. Wanted at least two.")
        data_sets.append(measure_pictures("Pictures", images, encoder, (bits, similarity)))
    return {"hardware": hardware(), "bits": bits, "similarity": similarity, **measure_time(), "data_sets": data_sets}


def page(result: dict[str, Any]) -> str:
    sections = []
    for data_set in result["data_sets"]:
        lines = {**data_set["recall"], "*other pictures (false removals)*": data_set["false"]}
        rows = [[kind, *(f"{100 * share:.1f} %" for share in shares.values())] for kind, shares in lines.items()]
        headings = ["removed", "by hash:", "by embedding:", "by either:"]
        sections.append(DATA_SET.format(**data_set, table=markdown_table(headings, rows)))
    return PAGE.format(**{**result, "data_sets": "".join(sections)}, edge=EDGE, hashes=HASHES, group=ROWS_PER_GROUP)


def main() -> None:
    parser = recipe_benchmark_parser("pipeline.near_copies", __doc__, "recipe with a [clip] model on disk")
    parser.add_argument("--count", type=int, default=500, help="number of drawn training pictures")
    parser.add_argument("--pictures", type=Path, help="folder of .jpg files to measure as well")
    report_on_recipe(
        parser, "near_copies", lambda recipe, options: measure(recipe, options.count, options.pictures), page
    )


if __name__ == "__main__":
    main()
