"""The pictures of the report: samples, training images and their neighbors, each small and inline.

Reads the tars of `download/`, the neighbor tables, `runs/<name>/sample/` and the world's style folders.
None is picked by hand: training images are drawn by a seed, samples are the first of the first prompts.
"""

import base64
import io
import re
import tarfile
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from jobs.demo.report.numbers import Demo
from retrieval.storage import schema
from retrieval.storage.manifest import read_manifest
from retrieval.storage.root import Root
from trainer.evaluation.styles import style_words
from trainer.sampling.request import TRAINING_DATABASE

THUMB_PX = 168
QUERY_PX = 320
QUALITY = 88


@dataclass(frozen=True)
class Shown:
    """A picture as a data URL, with the words that describe it and where it came from."""

    src: str
    caption: str
    url: str = ""
    similarity: float = 0.0


@dataclass(frozen=True)
class Sheet:
    """A picture with the neighbors that go with it, best first.

    title: what a sample was asked for. told: whether the network also got the prompt itself.
    """

    picture: Shown
    neighbors: tuple[Shown, ...]
    title: str = ""
    database: str = ""
    told: bool = False


@dataclass(frozen=True)
class GalleryRow:
    """One prompt in every style: (style, sample)."""

    prompt: str
    cells: tuple[tuple[str, Shown], ...]


def thumb(picture: Image.Image, edge: int = THUMB_PX) -> str:
    """A picture as the data URL of a JPEG, its longer edge at most `edge` pixels."""
    small = picture.convert("RGB")
    small.thumbnail((edge, edge), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=QUALITY, subsampling=0, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def gallery(demo: Demo, most: int) -> list[GalleryRow]:
    """The first samples of the first prompts by database: the paper's Fig. 3."""
    prompts, columns = _sampled(demo)
    return [
        GalleryRow(
            prompt,
            tuple((style_words(column), _sample(demo, column, number)[0]) for column in columns),
        )
        for number, prompt in enumerate(prompts[:most])
    ]


def are_held_out(world: Root, prompts: Iterable[str]) -> bool:
    """Whether all prompts describe held-out contents, which nothing of the demo was trained on."""
    with world.open("held_out.parquet") as file:
        known = pq.read_table(file, columns=["prompt"])["prompt"].to_pylist()
    return set(prompts) <= set(known)


def prompt_sheets(demo: Demo, count: int) -> list[Sheet]:
    """Samples with all neighbors that conditioned them, each of another prompt and database."""
    prompts, columns = _sampled(demo)
    columns = [column for column in columns if column != TRAINING_DATABASE]
    sheets = []
    for number in range(min(count, len(prompts))):
        column = columns[(number * 3) % len(columns)]
        picture, facts = _sample(demo, column, number)
        folder = _style_folder(demo.world, column)
        neighbors = tuple(
            Shown(
                src=thumb(_open(demo.world, f"{folder}/{found['url'].split('/', 1)[1]}")),
                caption=found["caption"],
                url=found["url"],
                similarity=found["similarity"],
            )
            for found in facts["neighbors"]
        )
        told = facts["mode"] != "neighbors"
        sheets.append(Sheet(picture, neighbors, prompts[number], style_words(column), told))
    return sheets


def image_sheets(demo: Demo, count: int, seed: int = 0) -> list[Sheet]:
    """Training images, drawn by the seed, with their neighbors from the table."""
    table = _neighbor_rows(demo.root)
    drawn = np.random.default_rng(seed).permutation(len(table))[:count]
    rows = table.take(pa.array(np.sort(drawn))).to_pylist()
    asked = [row[schema.IMAGE_ID] for row in rows]
    found = {image_id for row in rows for image_id in row[schema.NEIGHBOR_IDS]}
    queries = _downloaded(demo.root, "train", asked, QUERY_PX)
    database = _downloaded(demo.root, "database", found, THUMB_PX)
    return [
        Sheet(
            queries[row[schema.IMAGE_ID]],
            tuple(
                Shown(database[one].src, database[one].caption, database[one].url, similarity)
                for one, similarity in zip(row[schema.NEIGHBOR_IDS], row[schema.SIMILARITIES], strict=True)
            ),
        )
        for row in rows
    ]


def _sampled(demo: Demo) -> tuple[list[str], list[str]]:
    """The prompts and the columns (databases) of the samples."""
    values = read_manifest(demo.root, f"runs/{demo.name}/sample").values
    return values["prompts"], values["columns"]


def _sample(demo: Demo, column: str, number: int) -> tuple[Shown, dict[str, Any]]:
    """The first sample of a prompt and a database, and its provenance."""
    place = f"runs/{demo.name}/sample/{column}/{number:04d}-00"
    facts = demo.root.read_json(f"{place}.json")
    words = f"{facts['prompt']}, with neighbors from {style_words(column)}"
    return Shown(thumb(_open(demo.root, f"{place}.png")), words), facts


def _style_folder(world: Root, column: str) -> str:
    """The folder of pictures that a style database was made of: its name may be spelled with spaces."""
    folders = {name.split("/")[1] for name in world.list("styles")}
    return "styles/" + next(name for name in sorted(folders) if _plain(name) == _plain(column))


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", name.lower())


def _neighbor_rows(root: Root) -> pa.Table:
    """Ids and similarities of all neighbor tables, without the vectors."""
    columns = [schema.IMAGE_ID, schema.NEIGHBOR_IDS, schema.SIMILARITIES]
    parts = []
    for name in root.list("neighbors", ".parquet"):
        with root.open(name) as file:
            parts.append(pq.read_table(file, columns=columns))
    return pa.concat_tables(parts)


def _downloaded(root: Root, split: str, wanted: Iterable[int], edge: int) -> dict[int, Shown]:
    """The stored pictures of some image ids."""
    left = set(wanted)
    shown: dict[int, Shown] = {}
    for name in root.list(f"download/{split}", ".parquet"):
        table = schema.read_table(root, name, schema.DOWNLOADED)
        here = table.filter(pc.is_in(table[schema.IMAGE_ID], pa.array(sorted(left), pa.int64())))
        rows = {_key(row[schema.IMAGE_ID]): row for row in here.to_pylist()}
        with root.local(name.replace(".parquet", ".tar")) as path:
            for key, data in _members(str(path), rows):
                with Image.open(io.BytesIO(data)) as picture:
                    row = rows[key]
                    shown[row[schema.IMAGE_ID]] = Shown(thumb(picture, edge), row["caption"], row["url"])
    return shown


def _key(image_id: int) -> str:
    return f"{image_id & (1 << 64) - 1:016x}"


def _members(path: str, keys: Container[str]) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(path) as tar:
        for member in tar:
            key, _, kind = member.name.partition(".")
            if kind == "jpg" and key in keys and (file := tar.extractfile(member)):
                yield key, file.read()


def _open(root: Root, name: str) -> Image.Image:
    with root.open(name) as file, Image.open(file) as picture:
        return picture.convert("RGB")
