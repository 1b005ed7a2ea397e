"""`make bench-near-copies`: which planted copies of pictures are found, and what else is taken for one.

Reads RECIPE's [clip] and thresholds, and with `--pictures` a folder; draws the demo's scenes. Copies of
some pictures, made in ways that the web makes them, stand beside other pictures: what is near by its hash, by
its embedding, or by either, is removed. Writes `docs/near_copies.json` and `.md`.
"""

import argparse
import io
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps
from tqdm import tqdm

from benchmarks.common.report import DOCS, markdown_table, write_report
from jobs.cli.command import exit_on_user_error
from jobs.cli.recipe import Recipe, load_recipe
from jobs.demo.world.scenes import draw, random_scene
from jobs.reporting.hardware import hardware
from pipeline.pictures.picture import PictureError, prepare
from pipeline.recipe import EmbedConfig, NeighborsConfig
from retrieval.clip.encoder import Encoder
from retrieval.errors import UserError
from retrieval.perceptual_hash import PerceptualHashIndex, perceptual_hash
from retrieval.recipe import ClipConfig

EDGE = 256
MAX_PIXELS = 80_000_000
HASHES = 100_000
"""Random hashes on either side of the timed comparison."""

Described = tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]
"""Perceptual hashes (n,) and unit vectors (n, dim) of n pictures."""

PAGE = """# Near copies

`make bench-near-copies RECIPE=...`, on {hardware}.
A database picture is removed if its perceptual hash (64 bits) differs from that of a training picture or its
mirror in at most {bits} bits, or if its embedding is at least {similarity} similar to one. `make embed` removes by hash,
for good; `make neighbors` leaves out by embedding, for the training image concerned.
{worlds}
A hash takes {hash_ms:.2f} ms of a core for a decoded {edge} px picture. Comparing {hashes:,} random hashes
with as many, mirrors included, took {compare_s:.1f} s of a core; the pairs grow with the product of the two.
"""
WORLD = """
## {name}

{originals:,} training pictures, one copy of each a kind; {others:,} other pictures beside them.

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
    """Without a share of the width and of the height, taken from any side."""
    width, height = round(image.width * (1 - share)), round(image.height * (1 - share))
    left, top = rng.integers(image.width - width + 1), rng.integers(image.height - height + 1)
    return image.crop((int(left), int(top), int(left) + width, int(top) + height))


Kind = Callable[[Image.Image, np.random.Generator], Image.Image]
KINDS: dict[str, Kind] = {
    "resized to 40 %": lambda image, _: _scaled(image, 0.4),
    "recompressed, quality 40": lambda image, _: _jpeg(image, 40),
    "resized and recompressed": lambda image, _: _jpeg(_scaled(image, 0.5), 60),
    "mirrored": lambda image, _: _jpeg(ImageOps.mirror(image), 85),
    "cropped by 5 %": lambda image, rng: _jpeg(_cropped(image, 0.05, rng), 85),
    "cropped by 10 %": lambda image, rng: _jpeg(_cropped(image, 0.1, rng), 85),
    "cropped by 20 %": lambda image, rng: _jpeg(_cropped(image, 0.2, rng), 85),
}


def scenes(count: int) -> Iterator[Image.Image]:
    """The demo's pictures."""
    for number in range(count):
        yield Image.fromarray(draw(random_scene(np.random.default_rng([11, number])), EDGE, EDGE))


def pictures(folder: Path) -> Iterator[Image.Image]:
    """Those below a folder that can be used, as download stores them for the database; two sets alternate."""
    for path in sorted(folder.rglob("*.jpg")):
        try:
            picture = prepare(path.read_bytes(), MAX_PIXELS, EDGE)
        except PictureError:
            continue
        yield _scaled(image := Image.open(io.BytesIO(picture.data)).convert("RGB"), EDGE / min(image.size))


def described(images: list[Image.Image], encoder: Encoder) -> Described:
    """What the two ways of comparing know of pictures."""
    return np.array([perceptual_hash(image) for image in images], np.int64), encoder.encode_images(images)


def judged(theirs: Described, train: Described, bits: int, similarity: float) -> dict[str, float]:
    """The share of pictures that each way takes for copies of training pictures."""
    by_hash = PerceptualHashIndex(train[0]).contains_near(theirs[0], bits)
    by_embedding = (theirs[1] @ train[1].T).max(axis=1) >= similarity
    ways = {"hash": by_hash, "embedding": by_embedding, "either": by_hash | by_embedding}
    return {way: float(found.mean()) for way, found in ways.items()}


def world(
    name: str, images: list[Image.Image], encoder: Encoder, limits: tuple[int, float]
) -> dict[str, Any]:
    """Every second picture trains; the others are what must not be removed."""
    train, others = images[::2], images[1::2]
    known = described(train, encoder)
    found = {}
    for place, (kind, copy) in enumerate(tqdm(KINDS.items(), desc=name)):
        copies = [copy(image, np.random.default_rng([place, row])) for row, image in enumerate(train)]
        found[kind] = judged(described(copies, encoder), known, *limits)
    false = judged(described(others, encoder), known, *limits)
    return {"name": name, "originals": len(train), "others": len(others), "recall": found, "false": false}


def timed() -> dict[str, float]:
    """Milliseconds of a core to hash one picture, and seconds to compare many hashes."""
    [image] = scenes(1)
    began = time.process_time()
    for _ in range(100):
        perceptual_hash(image)
    hash_ms = 10 * (time.process_time() - began)
    known, asked = np.random.default_rng(0).integers(1, 1 << 63, (2, HASHES))
    began = time.process_time()
    PerceptualHashIndex(known).contains_near(asked, 6)
    return {"hash_ms": hash_ms, "compare_s": time.process_time() - began}


def measure(recipe: Recipe, count: int, folder: Path | None) -> dict[str, Any]:
    """Every world, with the thresholds of a recipe."""
    bits, similarity = recipe[EmbedConfig].near_copy_bits, recipe[NeighborsConfig].near_copy_similarity
    encoder = Encoder(recipe[ClipConfig])
    worlds = [world("Drawn scenes", list(scenes(2 * count)), encoder, (bits, similarity))]
    if folder:
        found = list(pictures(folder))
        if len(found) < 2:
            raise UserError(f"--pictures {folder} holds {len(found)} usable .jpg files; wanted two or more.")
        worlds.append(world("Pictures", found, encoder, (bits, similarity)))
    return {"hardware": hardware(), "bits": bits, "similarity": similarity, **timed(), "worlds": worlds}


def page(result: dict[str, Any]) -> str:
    """The page as Markdown."""
    worlds = []
    for one in result["worlds"]:
        lines = {**one["recall"], "*other pictures (false removals)*": one["false"]}
        rows = [
            [kind, *(f"{100 * share:.1f} %" for share in found.values())] for kind, found in lines.items()
        ]
        heads = ["removed", "by hash:", "by embedding:", "by either:"]
        worlds.append(WORLD.format(**one, table=markdown_table(heads, rows)))
    return PAGE.format(**{**result, "worlds": "".join(worlds)}, edge=EDGE, hashes=HASHES)


def main() -> None:
    """Measure and write the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pipeline.near_copies", description=__doc__)
    parser.add_argument("recipe", type=Path, metavar="RECIPE", help="whose [clip] is on disk")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", dest="overrides")
    parser.add_argument("--count", type=int, default=500, help="drawn training pictures")
    parser.add_argument("--pictures", type=Path, help="a folder of real pictures to try as well")
    parser.add_argument("--docs", type=Path, default=DOCS, help="where the page goes")
    options = parser.parse_args()

    def work() -> None:
        result = measure(load_recipe(options.recipe, options.overrides), options.count, options.pictures)
        write_report(options.docs, "near_copies", result, page(result))

    exit_on_user_error(work)


if __name__ == "__main__":
    main()
