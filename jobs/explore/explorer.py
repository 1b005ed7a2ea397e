"""Answers to searches and requests for pictures, on one root whose parts are opened once.

Reads the databases and the finished run of a recipe. Searches run side by side in threads; samples are made
one at a time, and stop between two denoising steps when nobody waits for them any more.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from threading import Event
from typing import Any

import numpy as np
import torch

from jobs.cli.recipe import Recipe
from jobs.explore.api_models import SampleAsk, SearchAsk, bytes_of
from jobs.explore.config import ExploreConfig
from jobs.explore.pictures import Pictures, decoded
from jobs.explore.work_queue import Turns
from jobs.sample import trained
from pipeline.web.sockets import Refusal
from retrieval.clip.encoder import Encoder
from retrieval.database.database import Database
from retrieval.errors import UserError
from retrieval.recipe import ClipConfig
from retrieval.storage.root import Root
from trainer.model.context import unit_rows
from trainer.sampling.denoising import Denoiser
from trainer.sampling.picture import png_bytes
from trainer.sampling.recipe import SampleConfig
from trainer.sampling.request import TRAINING_DATABASE, ImageQuery, Request, Sample
from trainer.sampling.sampler import Sampler, database_names, open_database

SHOWN_DETAILS = ("license", "title", "artist", "source", "box")


@dataclass(frozen=True)
class Shown:
    """A database row as people see it."""

    rank: int
    database: str
    image_id: str
    """64 bits as text: JavaScript would round the number."""
    similarity: float
    """Inner product with the query, -1..1."""
    caption: str
    url: str
    picture: str
    """Where this server has it, small; empty where it is not at hand."""
    weight: float
    """Of its token among the others; 0 in a search."""
    details: dict[str, Any]
    """License, title, artist, source and box, as far as the database knows them."""


@dataclass(frozen=True)
class Painted:
    """A finished sample, and its PNG with the recipe inside."""

    sample: Sample
    png: bytes


class Stopped(Exception):
    """Nobody waits for this picture any more."""


class Stoppable:
    """A UNet that raises Stopped once its event is set."""

    def __init__(self, unet: Denoiser) -> None:
        self.unet = unet
        self.stop = Event()

    def __call__(self, *args: Any, **options: Any) -> tuple[torch.Tensor, ...]:
        """One denoising step."""
        if self.stop.is_set():
            raise Stopped
        return self.unet(*args, **options)


class Explorer:
    """The opened parts. `search` and `sample` may be awaited by many at once."""

    def __init__(
        self, root: Root, limits: ExploreConfig, encoder: Encoder, sampler: Sampler | None, form: SampleConfig
    ) -> None:
        """form: what a request for a picture leaves out. Raises UserError where there is no database."""
        self.limits = limits
        self.encoder = encoder
        self.sampler = sampler
        self.form = form
        self.databases = _databases(root, encoder, sampler)
        self.pictures = Pictures(root, limits.max_pictures)
        self.searches = Turns("search", limits.search_threads, limits.max_searches, limits.search_timeout_s)
        self.samples = Turns("picture", 1, limits.max_samples, limits.sample_timeout_s)
        if sampler is not None:
            self._unet = sampler.unet = Stoppable(sampler.unet)
        for name, database in self.databases.items():
            self.pictures.add(name, database)

    @classmethod
    def open(cls, recipe: Recipe) -> "Explorer":
        """The parts that a recipe names; without a finished training there are searches alone."""
        limits = recipe[ExploreConfig] if recipe.has("explore") else ExploreConfig()
        form = recipe[SampleConfig] if recipe.has("sample") else SampleConfig()
        run = trained(recipe) if recipe.has("train") else None
        if run is None or not recipe.root.exists(f"{run.folder}/manifest.json"):
            return cls(recipe.root, limits, Encoder(recipe[ClipConfig]), None, form)
        sampler = Sampler.open(recipe.root, run, form)
        return cls(recipe.root, limits, sampler.encoder, sampler, form)

    @property
    def styles(self) -> list[str]:
        """Names of all databases but the training database."""
        return [name for name in self.databases if name != TRAINING_DATABASE]

    async def search(self, ask: SearchAsk) -> list[Shown]:
        """The k nearest rows, best first. Raises UserError, or Refused where the server is too busy."""
        ask.check(self.limits)
        database = self._database(ask.database)
        return await self.searches.run(lambda stop: self._found(ask, database))

    async def sample(self, asks: Sequence[SampleAsk]) -> list[Painted]:
        """One picture for each. Raises UserError, or Refused where the server is too busy."""
        for ask in asks:
            ask.check(self.limits)
            for name, _ in ask.weighted():
                self._database(name)
        return await self.samples.run(lambda stop: self._made(asks, stop))

    def neighbors(self, sample: Sample) -> list[Shown]:
        """What conditioned a sample, as people see it."""
        return [
            self._shown(rank, one.database, one.similarity, {**vars(one), **one.details}, one.weight)
            for rank, one in enumerate(sample.neighbors, 1)
        ]

    def image_query(self, data: bytes) -> ImageQuery:
        """A picture as a condition, seen as a search sees it. Raises UserError where it cannot be read."""
        return ImageQuery.of("picture", data, self.encoder.encode_images([self._picture(data)])[0])

    def close(self) -> None:
        """Take no more work."""
        self.searches.close()
        self.samples.close()

    def _found(self, ask: SearchAsk, database: Database) -> list[Shown]:
        vectors = [self.encoder.encode_texts([ask.text])] if ask.text.strip() else []
        if ask.image:
            vectors.append(self.encoder.encode_images([self._picture(bytes_of(ask.image, self.limits))]))
        query = unit_rows(np.concatenate(vectors)).mean(axis=0, keepdims=True)
        effort = database.effort(ask.recall, "images" if ask.image else "texts")
        found = database.search(query, ask.k, effort=effort)
        (rows,) = found.rows
        return [
            self._shown(rank, ask.database, float(similarity), row)
            for rank, (similarity, row) in enumerate(
                zip(found.similarities[0], rows.to_pylist(), strict=True), 1
            )
        ]

    def _made(self, asks: Sequence[SampleAsk], stop: Event) -> list[Painted]:
        sampler = self._require_sampler()
        self._unet.stop = stop
        samples = sampler.sample([self._request(ask) for ask in asks])
        return [Painted(one, png_bytes(one.picture, one.recipe())) for one in samples]

    def _request(self, ask: SampleAsk) -> Request:
        form, mix = self.form, ask.weighted()
        alone = mix[0][0] if len(mix) == 1 else TRAINING_DATABASE
        images = [self.image_query(bytes_of(one, self.limits)) for one in ask.images]
        images += [ImageQuery("picture", "", vector) for vector in ask.vectors]
        return Request(
            prompt=ask.prompt.strip(),
            seed=ask.seed,
            mode=ask.mode,
            database="" if ask.mode == "text" else alone,
            mix=tuple(mix) if len(mix) > 1 else (),
            k=ask.k or form.k,
            guidance=form.guidance if ask.guidance is None else ask.guidance,
            steps=ask.steps or form.steps,
            scheduler=ask.scheduler or form.scheduler,
            height=form.height,
            width=form.width,
            images=tuple(images),
            exclude=tuple(ask.exclude),
            weights=tuple(ask.factors()),
            top_m=ask.top_m,
        )

    def _picture(self, data: bytes) -> Any:
        picture = decoded(data, self.limits.max_upload_pixels)
        if isinstance(picture, Refusal):
            raise UserError(f"This picture cannot be used: {picture.message}.")
        return picture

    def _shown(
        self, rank: int, name: str, similarity: float, row: dict[str, Any], weight: float = 0.0
    ) -> Shown:
        image_id = int(row["image_id"])
        at_hand = self.pictures.has(name, image_id)
        return Shown(
            rank=rank,
            database=name,
            image_id=str(image_id),
            similarity=similarity,
            caption=row["caption"],
            url=row["url"],
            picture=f"/picture/{name}/{image_id}" if at_hand else "",
            weight=weight,
            details={word: row[word] for word in SHOWN_DETAILS if row.get(word) not in (None, "", "?")},
        )

    def _database(self, name: str) -> Database:
        if name not in self.databases:
            raise UserError(f"There is no database {name!r}. There are: {', '.join(self.databases)}.")
        return self.databases[name]

    def _require_sampler(self) -> Sampler:
        if self.sampler is None:
            raise UserError(
                "No trained model stands here yet, so there are searches alone. Run 'make train'."
            )
        return self.sampler


def _databases(root: Root, encoder: Encoder, sampler: Sampler | None) -> dict[str, Database]:
    names = [TRAINING_DATABASE] if root.exists(f"{TRAINING_DATABASE}/manifest.json") else []
    names += database_names(root)
    if not names:
        raise UserError(f"{root.url} holds no database. Run 'make index' or 'make database' first.")
    if sampler is not None:
        return {name: sampler.database(name) for name in names}
    opened = {name: open_database(root, name) for name in names}
    for database in opened.values():
        database.require_encoder(encoder.identity)
    return opened
