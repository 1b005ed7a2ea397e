"""Runs searches and makes samples for the page and the API, with the databases and the model of a recipe.

Searches run in parallel threads. Samples run one at a time, and stop between two steps when the request has timed out.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from threading import Event
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote

import numpy as np
import torch
from PIL import Image

from jobs.cli.explore_config import ExploreConfig
from jobs.cli.recipe import Recipe
from jobs.explore.api_models import SampleRequest, SearchRequest, VerifyRequest, decode_base64
from jobs.explore.examples import example_captions
from jobs.explore.pictures import Pictures, decode_picture
from jobs.explore.text_batches import TextBatches, Vectors
from jobs.explore.work_queue import Turns, WorkQueue
from jobs.sample import trained_model
from retrieval.clip.encoder import Encoder
from retrieval.database.database import Database
from retrieval.errors import UserError
from retrieval.pictures.decode import PictureError
from retrieval.recipe import ClipConfig
from retrieval.storage.root import Root
from retrieval.updates.current import CurrentDatabase
from trainer.attribution import Attribution, attribute
from trainer.model.context import unit_rows
from trainer.sampling.denoising import Denoiser
from trainer.sampling.recipe import SampleConfig
from trainer.sampling.request import TRAINING_DATABASE, ImageQuery, Neighbor, Request, Sample
from trainer.sampling.sampler import Sampler, database_names, open_database
from trainer.sampling.signing import picture_credentials, sample_png

if TYPE_CHECKING:
    from retrieval.provenance import SignedPicture

Result = TypeVar("Result")
SEARCHES_AT_ONCE = 8
"""Requests of `GET /search` that are served at a time. More are hardly faster, and delay `/health`."""
DETAILS = ("license", "title", "artist", "source", "box")


@dataclass(frozen=True)
class NeighborView:
    """A database row as the page and the API show it."""

    rank: int
    database: str
    image_id: str
    """64 bits as text, because JavaScript would round the number."""
    similarity: float
    """Inner product with the query, -1..1."""
    caption: str
    url: str
    picture: str
    """URL of the thumbnail, relative to that of the page; empty if there is none."""
    weight: float
    """Weight of the neighbor's token in a sample; 0 in a search."""
    details: dict[str, Any]
    """License, title, artist, source and box, as far as the database has them."""


@dataclass(frozen=True)
class SampledPicture:
    """A finished sample, and its PNG with the recipe in it."""

    sample: Sample
    png: bytes


@dataclass(frozen=True)
class AttributedPicture:
    """A picture with and without a group of neighbors."""

    attribution: Attribution
    with_group: SampledPicture
    without_group: SampledPicture


@dataclass
class Progress:
    """Denoising steps of a sampling request."""

    done: int = 0
    total: int = 0
    """0 until sampling starts."""


class CancelledSample(Exception):
    """The request of this sample has ended."""


class CancellableUNet:
    """A UNet that raises CancelledSample once its event is set."""

    def __init__(self, unet: Denoiser) -> None:
        self.unet = unet
        self.stop = Event()
        self.progress = Progress()

    def __call__(self, *args: Any, **options: Any) -> tuple[torch.Tensor, ...]:
        """One denoising step."""
        if self.stop.is_set():
            raise CancelledSample
        self.progress.done += 1
        return self.unet(*args, **options)


class Explorer:
    """The opened databases and model. `search` and `sample` may be called concurrently."""

    def __init__(
        self, root: Root, limits: ExploreConfig, encoder: Encoder, sampler: Sampler | None, defaults: SampleConfig
    ) -> None:
        """defaults: settings that a sampling request leaves out. Raises UserError if there is no database."""
        self.limits = limits
        self.encoder = encoder
        self.sampler = sampler
        self.defaults = defaults
        self.credentials = picture_credentials(defaults)
        self.databases = _databases(root, encoder, sampler)
        self._current = {name: CurrentDatabase(database) for name, database in self.databases.items()}
        self.pictures = Pictures(root, limits.max_rows_with_pictures)
        self.turns = Turns("search", SEARCHES_AT_ONCE, limits.max_searches, limits.search_timeout_s)
        self.texts = TextBatches(encoder, WorkQueue("text", 1, limits.max_searches, limits.search_timeout_s))
        self.searches = WorkQueue("search", limits.search_threads, limits.max_searches, limits.search_timeout_s)
        self.samples = WorkQueue("picture", 1, limits.max_samples, limits.sample_timeout_s)
        self.thumbnails = WorkQueue("thumbnail", limits.search_threads, limits.max_thumbnails, limits.search_timeout_s)
        if sampler is not None:
            self._unet = sampler.unet = CancellableUNet(sampler.unet)
        for name, database in self.databases.items():
            self.pictures.add(name, database)
        styles_first = [*self.styles, *(name for name in self.databases if name == TRAINING_DATABASE)]
        self.examples = example_captions([self.databases[name] for name in styles_first], encoder)
        """Texts that the encoder knows, for the page."""
        first = (self.styles or [TRAINING_DATABASE])[0]
        self.first_search = SearchRequest(text="".join(self.examples[:1]), database=first, k=min(12, limits.max_k))
        """The search that the page shows at first; without a text if no example is known."""
        self.first_results: list[NeighborView] = []
        if self.examples:
            text = encoder.encode_texts(self.examples[:1])
            self.first_results = self._search(self.first_search, text)

    @classmethod
    def open(cls, recipe: Recipe) -> "Explorer":
        """Open what a recipe names. Without a finished training only searches are possible."""
        limits = recipe[ExploreConfig] if recipe.has("explore") else ExploreConfig()
        defaults = recipe[SampleConfig] if recipe.has("sample") else SampleConfig()
        run = trained_model(recipe) if recipe.has("train") else None
        if run is None or not recipe.root.exists(f"{run.folder}/manifest.json"):
            return cls(recipe.root, limits, Encoder(recipe[ClipConfig]), None, defaults)
        sampler = Sampler.open(recipe.root, run, defaults)
        return cls(recipe.root, limits, sampler.encoder, sampler, defaults)

    @property
    def queues(self) -> tuple[WorkQueue, ...]:
        return self.texts.queue, self.searches, self.samples, self.thumbnails

    @property
    def styles(self) -> list[str]:
        """Names of all databases but the training database."""
        return [name for name in self.databases if name != TRAINING_DATABASE]

    async def search(self, request: SearchRequest) -> list[NeighborView]:
        """The k nearest rows, best first. Raises UserError, or BusyError if the server is overloaded."""
        request.check(self.limits)
        self._require_database(request.database)
        text = await self.texts.encode(request.text) if request.text.strip() else None
        return await self.searches.run(lambda stop: self._search(request, text))

    def note(self, text: str) -> str:
        """A sentence for a text of which CLIP reads only the start; else ""."""
        return self.encoder.truncation_note([text])

    async def sample(self, requests: Sequence[SampleRequest], progress: Progress | None = None) -> list[SampledPicture]:
        """One picture for each request. Raises UserError, or BusyError if the server is overloaded.

        progress: counts the steps, while the server computes this request.
        """
        for request in requests:
            self._check(request)

        def work(sampler: Sampler) -> list[SampledPicture]:
            return [self._picture_of(each) for each in sampler.sample([*map(self._sampler_request, requests)])]

        batches = -(-len(requests) // self.defaults.batch_size)  # the page's requests have equal steps and lengths
        return await self._run_sampler(work, batches * max(map(self._steps, requests)), progress)

    async def attribute(self, request: SampleRequest, progress: Progress | None = None) -> AttributedPicture:
        """A picture with and without the rows that meet `without`. Raises UserError and BusyError as `sample`."""
        self._check(request)

        def work(sampler: Sampler) -> AttributedPicture:
            complete = self._sampler_request(request.model_copy(update={"without": ""}))
            result = attribute(sampler, complete, request.without)
            return AttributedPicture(result, self._picture_of(result.sample), self._picture_of(result.without))

        return await self._run_sampler(work, 2 * self._steps(request), progress)

    async def verify(self, request: VerifyRequest) -> "SignedPicture | None":
        """The signed statement of a picture; None if it has none. Raises UserError for other files, and BusyError."""
        from retrieval.provenance import read_signature

        data = decode_base64(request.image, self.limits)
        return await self.searches.run(lambda stop: read_signature(data))

    async def thumbnail(self, database: str, image_id: int) -> bytes | None:
        """A row's picture as a small JPEG, or None. Raises BusyError if the server is overloaded."""
        return await self.thumbnails.run(lambda stop: self._thumbnail(database, image_id))

    def neighbors(self, sample: Sample) -> list[NeighborView]:
        return self.views(sample.neighbors)

    def views(self, neighbors: Sequence[Neighbor]) -> list[NeighborView]:
        """Neighbors of a sample as the page and the API show them."""
        return [
            self._view(rank, row.database, row.similarity, {**vars(row), **row.details}, row.weight)
            for rank, row in enumerate(neighbors, 1)
        ]

    def image_query(self, data: bytes) -> ImageQuery:
        """A picture as a condition, embedded as in a search. Raises UserError if it cannot be read."""
        vectors = self.encoder.encode_images([self._picture(data)], unit=False)
        return ImageQuery.from_file("picture", data, vectors[0])

    def close(self) -> None:
        """Accept no more work."""
        for queue in self.queues:
            queue.close()

    def _thumbnail(self, name: str, image_id: int) -> bytes | None:
        if name in self.databases:
            self._newest(name)
        return self.pictures.thumbnail(name, image_id)

    def _search(self, request: SearchRequest, text: Vectors | None) -> list[NeighborView]:
        vectors = [] if text is None else [text]
        if request.image:
            picture = self._picture(decode_base64(request.image, self.limits))
            vectors.append(self.encoder.encode_images([picture]))
        query = unit_rows(np.concatenate(vectors)).mean(axis=0, keepdims=True)
        like = "images" if request.image else "texts"
        database = self._newest(request.database)
        database = database.where(request.where) if request.where.strip() else database
        neighbors = database.search(query, request.k, recall=request.recall, like=like)
        rows = neighbors.rows[0]
        pairs = zip(neighbors.similarities[0].tolist(), rows.to_pylist(), strict=True)
        return [self._view(rank, request.database, similarity, row) for rank, (similarity, row) in enumerate(pairs, 1)]

    def _check(self, request: SampleRequest) -> None:
        request.check(self.limits)
        for name, _ in request.databases():
            self._require_database(name)

    async def _run_sampler(
        self, work: Callable[[Sampler], Result], num_steps: int, progress: Progress | None
    ) -> Result:
        """The result of work that takes about `num_steps` calls of the UNet."""

        def run(stop: Event) -> Result:
            if self.sampler is None:
                raise UserError("There is no trained model yet. Run 'make train', then restart this server.")
            self._unet.stop, self._unet.progress = stop, progress or Progress()
            self._unet.progress.total = num_steps
            return work(self.sampler)

        return await self.samples.run(run)

    def _steps(self, request: SampleRequest) -> int:
        return request.steps or self.defaults.steps

    def _picture_of(self, sample: Sample) -> SampledPicture:
        return SampledPicture(sample, sample_png(sample, self.credentials))

    def _sampler_request(self, request: SampleRequest) -> Request:
        defaults, mix = self.defaults, request.databases()
        database = mix[0][0] if len(mix) == 1 else TRAINING_DATABASE
        images = [self.image_query(decode_base64(image, self.limits)) for image in request.images]
        images += [ImageQuery("picture", "", vector) for vector in request.vectors]
        guidance = defaults.guidance if request.guidance is None else request.guidance
        sampled = replace(
            defaults.request(request.prompt.strip(), request.seed, request.mode, database),
            mix=tuple(mix) if len(mix) > 1 else (),
            k=request.k or defaults.k,
            guidance=guidance,
            negative_prompt="" if guidance == 1 else defaults.negative_prompt,  # it has no effect without guidance
            steps=self._steps(request),
            scheduler=request.scheduler or defaults.scheduler,
            images=tuple(images),
            exclude=tuple(request.exclude),
            without=request.without.strip(),
            weights=tuple(request.id_factors()),
            top_m=request.top_m,
        )
        if self.sampler is not None:
            names = [name for name in sampled.database_weights() if name in self.databases]
            self.sampler.databases |= {name: self._newest(name) for name in names}
        return sampled

    def _picture(self, data: bytes) -> Image.Image:
        try:
            return decode_picture(data, self.limits.max_upload_pixels)
        except PictureError as error:
            raise UserError(f"This picture cannot be used: {error}.") from error

    def _view(self, rank: int, name: str, similarity: float, row: dict[str, Any], weight: float = 0.0) -> NeighborView:
        image_id = int(row["image_id"])
        return NeighborView(
            rank=rank,
            database=name,
            image_id=str(image_id),
            similarity=similarity,
            caption=row["caption"],
            url=row["url"],
            picture=f"picture/{quote(name)}/{image_id}" if self.pictures.has(name, image_id) else "",
            weight=weight,
            details={key: row[key] for key in DETAILS if row.get(key) not in (None, "", "?")},
        )

    def _require_database(self, name: str) -> None:
        if name not in self.databases:
            raise UserError(f"There is no database {name!r}. Databases: {', '.join(self.databases)}.")

    def _newest(self, name: str) -> Database:
        """The present state of a database and of its thumbnails. Reads files."""
        newest, before = self._current[name].get(), self.databases[name]
        if newest.manifest is not before.manifest:
            self.pictures.add(name, newest)
        elif newest is not before:
            self.pictures.hide(name, newest.hidden)
        self.databases[name] = newest
        return newest


def _databases(root: Root, encoder: Encoder, sampler: Sampler | None) -> dict[str, Database]:
    names = [TRAINING_DATABASE] if root.exists(f"{TRAINING_DATABASE}/manifest.json") else []
    names += database_names(root)
    if not names:
        raise UserError(f"{root.url} has no database. Run 'make index' or 'make database' first.")
    if sampler is not None:
        return {name: sampler.database(name) for name in names}
    opened = {name: open_database(root, name) for name in names}
    for database in opened.values():
        database.require_encoder(encoder.identity)
    return opened
