"""The pictures of the report as small data URLs: samples, training images and their neighbors.

No picture is chosen by hand: training images are drawn with a seed, samples are the first of the first prompts.
"""

import io
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from jobs.demo.report.numbers import Demo, open_picture
from jobs.reporting.thumbnails import stored_pictures, thumb
from retrieval.storage import schema
from retrieval.storage.manifest import read_manifest
from retrieval.storage.root import Root
from trainer.evaluation.styles import style_words
from trainer.sampling.request import TRAINING_DATABASE

THUMB_PX = 168
QUERY_PX = 320


@dataclass(frozen=True)
class ReportPicture:
    """A picture as a data URL (src), its caption, its source URL, and its similarity as a neighbor."""

    src: str
    caption: str
    url: str = ""
    similarity: float = 0.0


@dataclass(frozen=True)
class PictureWithNeighbors:
    """A picture with its neighbors, best first.

    prompt, database: of a sample, else "". prompt_in_context: the network also got the prompt's embedding.
    """

    picture: ReportPicture
    neighbors: tuple[ReportPicture, ...]
    prompt: str = ""
    database: str = ""
    prompt_in_context: bool = False


@dataclass(frozen=True)
class GalleryRow:
    """One prompt in every style. cells: pairs of style and sample."""

    prompt: str
    cells: tuple[tuple[str, ReportPicture], ...]


def gallery(demo: Demo, max_prompts: int) -> list[GalleryRow]:
    """The first sample of each of the first prompts from each database: the paper's Fig. 3."""
    prompts, columns = _prompts_and_columns(demo)
    return [
        GalleryRow(prompt, tuple((style_words(column), _sample(demo, column, number)[0]) for column in columns))
        for number, prompt in enumerate(prompts[:max_prompts])
    ]


def are_held_out(world: Root, prompts: Iterable[str]) -> bool:
    """True if all prompts have held-out contents, which no training, database or style picture shows."""
    with world.open("held_out.parquet") as file:
        held_out = pq.read_table(file, columns=["prompt"])["prompt"].to_pylist()
    return set(prompts) <= set(held_out)


def samples(demo: Demo, count: int) -> list[PictureWithNeighbors]:
    """Samples with all their neighbors, each with another prompt and database."""
    prompts, columns = _prompts_and_columns(demo)
    columns = [column for column in columns if column != TRAINING_DATABASE]
    result = []
    for number in range(min(count, len(prompts))):
        column = columns[(number * 3) % len(columns)]
        picture, record = _sample(demo, column, number)
        folder = _style_folder(demo.world, column)
        neighbors = tuple(
            ReportPicture(
                src=thumb(open_picture(demo.world, f"{folder}/{neighbor['url'].split('/', 1)[1]}"), THUMB_PX),
                caption=neighbor["caption"],
                url=neighbor["url"],
                similarity=neighbor["similarity"],
            )
            for neighbor in record["neighbors"]
        )
        in_context = record["mode"] != "neighbors"
        result.append(PictureWithNeighbors(picture, neighbors, prompts[number], style_words(column), in_context))
    return result


def training_images(demo: Demo, count: int, seed: int = 0) -> list[PictureWithNeighbors]:
    """Random training images with their neighbors from the neighbor table."""
    table = _neighbor_rows(demo.root)
    numbers = np.random.default_rng(seed).permutation(len(table))[:count]
    rows = table.take(pa.array(np.sort(numbers))).to_pylist()
    query_ids = [row[schema.IMAGE_ID] for row in rows]
    neighbor_ids = {image_id for row in rows for image_id in row[schema.NEIGHBOR_IDS]}
    queries = _downloaded(demo.root, "train", query_ids, QUERY_PX)
    database = _downloaded(demo.root, "database", neighbor_ids, THUMB_PX)
    return [
        PictureWithNeighbors(
            queries[row[schema.IMAGE_ID]],
            tuple(
                replace(database[image_id], similarity=similarity)
                for image_id, similarity in zip(row[schema.NEIGHBOR_IDS], row[schema.SIMILARITIES], strict=True)
            ),
        )
        for row in rows
    ]


def _prompts_and_columns(demo: Demo) -> tuple[list[str], list[str]]:
    """The prompts and the databases (columns) of the samples."""
    values = read_manifest(demo.root, f"runs/{demo.name}/sample").values
    return values["prompts"], values["columns"]


def _sample(demo: Demo, column: str, number: int) -> tuple[ReportPicture, dict[str, Any]]:
    """The first sample of a prompt and a database, and its JSON record."""
    path = f"runs/{demo.name}/sample/{column}/{number:04d}-00"
    record = demo.root.read_json(f"{path}.json")
    caption = f"{record['prompt']}, with neighbors from {style_words(column)}"
    return ReportPicture(thumb(open_picture(demo.root, f"{path}.png"), THUMB_PX), caption), record


def _style_folder(world: Root, column: str) -> str:
    """The folder with the pictures of a style database. Its name may have spaces instead of underscores."""
    folders = {name.split("/")[1] for name in world.list("styles")}
    return "styles/" + next(name for name in sorted(folders) if _normalized(name) == _normalized(column))


def _normalized(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", name.lower())


def _neighbor_rows(root: Root) -> pa.Table:
    """Ids and similarities of all neighbor tables."""
    columns = [schema.IMAGE_ID, schema.NEIGHBOR_IDS, schema.SIMILARITIES]
    parts = []
    for name in root.list("neighbors", ".parquet"):
        with root.open(name) as file:
            parts.append(pq.read_table(file, columns=columns))
    return pa.concat_tables(parts)


def _downloaded(root: Root, split: str, image_ids: Iterable[int], edge: int) -> dict[int, ReportPicture]:
    """The downloaded pictures with these image ids."""
    id_array = pa.array(sorted(set(image_ids)), pa.int64())
    pictures: dict[int, ReportPicture] = {}
    for name in root.list(f"download/{split}", ".parquet"):
        table = schema.read_table(root, name, schema.DOWNLOADED)
        matches = table.filter(pc.is_in(table[schema.IMAGE_ID], id_array))
        rows = {row[schema.IMAGE_ID]: row for row in matches.to_pylist()}
        for image_id, data in stored_pictures(root, name.replace(".parquet", ".tar"), rows):
            with Image.open(io.BytesIO(data)) as picture:
                row = rows[image_id]
                pictures[image_id] = ReportPicture(thumb(picture, edge), row["caption"], row["url"])
    return pictures
