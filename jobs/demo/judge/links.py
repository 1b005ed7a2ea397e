"""Where contents are lost: accuracy by attribute after each step from real pictures to samples.

Reads the held-out pictures, CLIP, autoencoder, neighbor tables, style databases and the samples of the evaluation.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image

from jobs.cli.recipe import Recipe
from jobs.demo.judge.labels import CLASSES, equal, labels_of, shares
from jobs.demo.judge.network import ContentJudge, Pixels, train_judge
from jobs.demo.recipe import JudgeTraining, WorldConfig
from jobs.demo.world.content import Content, Scene
from jobs.demo.world.metadata import CONTENT_FIELDS
from jobs.demo.world.scenes import ARRANGEMENTS, contents_by_prompt, full_caption
from jobs.demo.world.world import plan_styles
from pipeline.web.urls import canonical_url
from retrieval.clip.encoder import Encoder
from retrieval.recipe import ClipConfig
from retrieval.storage import schema
from retrieval.storage.manifest import read_manifest
from retrieval.storage.root import Root
from trainer.evaluation.intervals import Estimate
from trainer.evaluation.pixel_judge import thumbnails
from trainer.evaluation.recipe import EvaluateConfig
from trainer.evaluation.styles import NO_NEIGHBORS, RETRIEVAL, style_words
from trainer.model.autoencoder import Autoencoder
from trainer.model.recipe import AutoencoderConfig
from trainer.recipe import TrainConfig
from trainer.sampling.picture import open_picture, read_recipe
from trainer.sampling.sampler import open_database

LINKS = {
    "real": "real held-out pictures",
    "autoencoder": "the same, encoded and decoded by the autoencoder",
    "clip": "the same, CLIP: the true caption against captions with another value",
    "training_neighbors": "neighbors of training images, compared with the image",
    "style_neighbors": "neighbors of prompts in style databases, compared with the prompt",
    "samples": "samples with the prompt and these neighbors",
    "samples_no_neighbors": "samples with the prompt alone",
}
"""Every link, in the order of the demo, in words."""
Shares = dict[str, Estimate]


def measure_links(recipe: Recipe) -> dict[str, Shares]:
    """Share of correct pictures by link and attribute. Trains the judge. Raises UserError for an unfinished stage."""
    judge = train_judge(recipe[JudgeTraining], recipe[WorldConfig].seed)
    scenes, pixels = _held_out(recipe.root.child("world"))
    wanted = labels_of(scenes)
    decoded = _round_trip(pixels, Autoencoder.load(recipe[AutoencoderConfig], "cpu"))
    few = slice(recipe[JudgeTraining].num_pictures)
    return {
        "real": shares(equal(judge.predict(pixels), wanted), wanted),
        "autoencoder": shares(equal(judge.predict(decoded), wanted), wanted),
        "clip": _clip(scenes[few], pixels[few], Encoder(recipe[ClipConfig])),
        "training_neighbors": _training_neighbors(recipe.root),
        **_samples(recipe, judge),
    }


def _held_out(world: Root) -> tuple[list[Scene], Pixels]:
    """The held-out scenes and their pictures (n, EDGE, EDGE, 3)."""
    with world.open("held_out.parquet") as file:
        rows = pq.read_table(file).to_pylist()
    return [_scene(row) for row in rows], thumbnails(open_picture(world, row["path"]) for row in rows)


def _scene(row: Mapping[str, Any]) -> Scene:
    """The scene of a row of the world's tables, without its seed."""
    return Scene(Content(**{name: row[name] for name in CONTENT_FIELDS}), row["style"], 0)


def _round_trip(pixels: Pixels, autoencoder: Autoencoder) -> Pixels:
    images = torch.from_numpy(pixels).movedim(3, 1).float() / 127.5 - 1
    decoded = autoencoder.decode(autoencoder.encode_moments(images)[:, : autoencoder.channels])
    return ((decoded + 1) * 127.5).round().to(torch.uint8).movedim(1, 3).numpy()


def _clip(scenes: Sequence[Scene], pixels: Pixels, encoder: Encoder) -> Shares:
    """Share of pictures whose most similar caption, of those that differ in one attribute, has their value of it."""
    vectors = encoder.encode_images([Image.fromarray(picture) for picture in pixels])
    flags: dict[str, Any] = {}
    for name in CLASSES:
        candidates = [variants(scene, name) for scene in scenes]
        texts = encoder.encode_texts([full_caption(candidate) for row in candidates for candidate in row])
        best = np.einsum("nvd,nd->nv", texts.reshape(len(scenes), -1, texts.shape[1]), vectors).argmax(axis=1)
        chosen = labels_of([row[i] for row, i in zip(candidates, best, strict=True)])
        flags[name] = chosen[name] == labels_of(scenes)[name]
    return shares(flags, labels_of(scenes))


def variants(scene: Scene, name: str) -> list[Scene]:
    """The scene with every value of an attribute. Count and layout vary together: a single figure has no layout."""
    content = scene.content
    if name == "style":
        return [replace(scene, style=str(style)) for style in CLASSES[name]]
    if name in ("count", "layout"):
        contents = [replace(content, count=count, layout=layout) for count, layout in ARRANGEMENTS]
    else:
        contents = [Content(**{**vars(content), name: value}) for value in CLASSES[name]]
    return [replace(scene, content=content) for content in contents]


def _training_neighbors(root: Root) -> Shares:
    """Share of neighbors with the attribute of their training image."""
    with root.open("world/truth.parquet") as file:
        rows = pq.read_table(file).drop_null().to_pylist()
    scenes = {schema.image_id(canonical_url(row["url"])): _scene(row) for row in rows}
    images: list[Scene] = []
    neighbors: list[Scene] = []
    for name in read_manifest(root, "neighbors").checksums():
        with root.open(name) as file:
            table = pq.read_table(file, columns=[schema.IMAGE_ID, schema.NEIGHBOR_IDS])
        for row in table.to_pylist():
            neighbors += [scenes[image_id] for image_id in row[schema.NEIGHBOR_IDS]]
            images += [scenes[row[schema.IMAGE_ID]]] * len(row[schema.NEIGHBOR_IDS])
    return _agreement(neighbors, images)


def _agreement(neighbors: Sequence[Scene], wanted: Sequence[Scene]) -> Shares:
    labels = labels_of(wanted)
    return shares(equal(labels_of(neighbors), labels), labels)


@dataclass(frozen=True)
class JudgedSample:
    """A sample of the evaluation: its pixels, the requested scene, and its recipe."""

    picture: Image.Image
    wanted: Scene
    recipe: Mapping[str, Any]


def _samples(recipe: Recipe, judge: ContentJudge) -> dict[str, Shares]:
    """Samples of the evaluation with and without neighbors, and the neighbors of the former."""
    retrieved, plain = (_read_samples(recipe, mode) for mode in (RETRIEVAL, NO_NEIGHBORS))
    without_style = _judged(plain, judge)
    del without_style["style"]  # nothing names one
    return {
        "style_neighbors": _style_neighbors(recipe, retrieved),
        "samples": _judged(retrieved, judge),
        "samples_no_neighbors": without_style,
    }


def _read_samples(recipe: Recipe, mode: str) -> list[JudgedSample]:
    root, folder = recipe.root, f"runs/{recipe[TrainConfig].name}/evaluate/samples/{mode}"
    samples = []
    for style in recipe[EvaluateConfig].styles:
        for name in root.list(f"{folder}/{style}", ".png"):
            with root.open(name) as file:
                made = read_recipe(file.read())
            scene = Scene(contents_by_prompt()[made["prompt"]], style_words(style), 0)
            samples.append(JudgedSample(open_picture(root, name), scene, made))
    return samples


def _judged(samples: Sequence[JudgedSample], judge: ContentJudge) -> Shares:
    wanted = labels_of([sample.wanted for sample in samples])
    predicted = judge.predict(thumbnails(sample.picture for sample in samples))
    return shares(equal(predicted, wanted), wanted)


def _style_neighbors(recipe: Recipe, samples: Sequence[JudgedSample]) -> Shares:
    """Share of the neighbors of samples with the requested attribute."""
    drawn = {drawing.path: drawing.scene for drawing in plan_styles(recipe[WorldConfig])}
    files = {name: _database_files(recipe.root, name) for name in recipe[EvaluateConfig].styles}
    pairs = [
        (drawn[f"styles/{sample.wanted.style}/{files[sample.recipe['database']][image_id]}"], sample.wanted)
        for sample in samples
        for image_id, _ in sample.recipe["neighbors"]
    ]
    return _agreement([scene for scene, _ in pairs], [wanted for _, wanted in pairs])


def _database_files(root: Root, name: str) -> dict[int, str]:
    """Image id to file name of the pictures of a style database."""
    database = open_database(root, name)
    rows = database.metadata_at(np.arange(len(database)))
    files = (url.rsplit("/", maxsplit=1)[-1] for url in rows["url"].to_pylist())
    return dict(zip(rows[schema.IMAGE_ID].to_pylist(), files, strict=True))
