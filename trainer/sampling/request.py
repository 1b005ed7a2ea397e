"""What is asked of the sampler and what it gives back, as plain values.

Reads a prompts file; everything else is a record: a request, a neighbor, a finished sample with the
recipe that makes it again.
"""

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np
from PIL import Image

from retrieval.errors import UserError
from retrieval.storage.root import Root
from trainer.model.context import Mode, Vectors
from trainer.recipe import SchedulerName

TRAINING_DATABASE = "index"
MAX_SEED = 2**32 - 1
"""torch's CPU generator heeds 32 bits of a seed: above, pictures would come again."""
MAX_WEIGHT = 1e6


@dataclass(frozen=True)
class ImageQuery:
    """A picture to condition on, as its embedding, so that a recipe is whole without the file."""

    name: str
    """What people call it."""
    sha256: str
    """Of the file's bytes, in hex."""
    vector: str
    """Base64 of the unit vector (dim,), float32, little-endian."""

    @classmethod
    def of(cls, name: str, data: bytes, vector: Vectors) -> "ImageQuery":
        """A picture's file with its embedding (dim,)."""
        coded = base64.b64encode(vector.astype("<f4").tobytes()).decode()
        return cls(name, hashlib.sha256(data).hexdigest(), coded)

    @property
    def embedding(self) -> Vectors:
        """(dim,) float32. Raises UserError for text that is no vector."""
        try:
            return np.frombuffer(base64.b64decode(self.vector, validate=True), "<f4").astype(np.float32)
        except ValueError as error:
            raise UserError(f"the vector of image {self.name!r} is not base64 of float32: {error}") from error


@dataclass(frozen=True)
class Request:
    """One picture to make."""

    prompt: str
    """Any text: the query for neighbors and, unless the mode is `neighbors`, a token of the context.
    Empty: no text, where images are given or the mode is `unconditional`."""
    seed: int = 0
    """Of the initial noise, 0 .. MAX_SEED; it means the same picture in every batch."""
    mode: Mode = "text_and_neighbors"
    """What the UNet is told."""
    database: str = TRAINING_DATABASE
    """A name below `databases/`, or `index` for the training database; not read in mode `text`."""
    k: int = 19
    """Neighbors to retrieve."""
    guidance: float = 5.0
    """Scale s of classifier-free guidance."""
    steps: int = 50
    """Denoising steps."""
    scheduler: SchedulerName = "ddim"
    """`ddim`, `plms` or `dpm++`."""
    height: int = 0
    """Of the picture in pixels; 0 for the size of training."""
    width: int = 0
    """As `height`."""
    mix: tuple[tuple[str, float], ...] = ()
    """Databases with weights above 0, in place of `database`: each gives k neighbors, and these weigh in
    attention as its share of all weights, so that a mix weighs as much as one database."""
    images: tuple[ImageQuery, ...] = ()
    """Pictures to condition on: tokens as the prompt is; the query is the mean direction of all of them."""
    exclude: tuple[int, ...] = ()
    """Image ids that are no neighbors; the next best come in their place."""
    weights: tuple[tuple[int, float], ...] = ()
    """Image ids with factors on what they weigh as neighbors: 2 counts one twice, 0 leaves it out."""
    top_m: float = 1.0
    """Mode `unconditional`: share, above 0 and up to 1, of the most retrieved images to draw from."""

    @classmethod
    def of(cls, recipe: Mapping[str, Any]) -> "Request":
        """The request in a sample's recipe, as JSON gives it. Raises UserError where it is none."""
        names = {one.name for one in fields(cls)}
        try:
            values = {name: value for name, value in recipe.items() if name in names}
            for name in ("mix", "weights"):
                values[name] = tuple((key, factor) for key, factor in values.get(name, ()))
            values["exclude"] = tuple(values.get("exclude", ()))
            values["images"] = tuple(ImageQuery(**one) for one in values.get("images", ()))
            return cls(**values)
        except (TypeError, ValueError) as error:
            raise UserError(f"this is no recipe of a sample: {error}") from error

    def shares(self) -> dict[str, float]:
        """The databases to search and what a neighbor from each weighs, 1 in all; none in mode `text`."""
        if self.mode == "text":
            return {}
        mix = self.mix or ((self.database, 1.0),)
        total = sum(weight for _, weight in mix)
        return {name: weight / total for name, weight in mix}

    def check(self) -> None:
        """Raises UserError for values that mean nothing, whatever the model."""
        if not (self.prompt or self.images or self.mode == "unconditional"):
            raise UserError("nothing to condition on: give a prompt, an image, or mode 'unconditional'.")
        if not 0 <= self.seed <= MAX_SEED:
            raise UserError(f"a seed must be 0 to {MAX_SEED}, got {self.seed}")
        if self.k < 1:
            raise UserError(f"k must be at least 1, got {self.k}")
        if not 0 < self.top_m <= 1:
            raise UserError(f"top_m must be above 0 and at most 1, got {self.top_m}")
        if len(dict(self.mix)) < len(self.mix) or not all(0 < weight < MAX_WEIGHT for _, weight in self.mix):
            raise UserError(f"mix: wanted each database once, with a weight above 0, got {dict(self.mix)}")
        if not all(0 <= factor < MAX_WEIGHT for _, factor in self.weights):
            raise UserError(f"weights of neighbors must be 0 to {MAX_WEIGHT:g}, got {dict(self.weights)}")


@dataclass(frozen=True)
class Neighbor:
    """A database image that conditioned a sample."""

    image_id: int
    similarity: float
    """Inner product with the query, -1..1."""
    url: str
    caption: str
    database: str = ""
    weight: float = 1.0
    """What it weighs in attention; the prompt and images weigh 1."""
    details: dict[str, Any] = field(default_factory=dict)
    """What else its database keeps of it: license, title, artist, source, box."""


@dataclass(frozen=True)
class Sample:
    """A finished picture with all that made it."""

    request: Request
    picture: Image.Image
    neighbors: tuple[Neighbor, ...]
    """Best first, by database; empty in mode `text`."""
    model: dict[str, str]
    """Checksums of the parts: `model`, `encoder`, `autoencoder`, and the `precision`."""
    pseudo_query: int | None = None
    """Mode `unconditional`: id of the image that stood for the query."""

    def recipe(self) -> dict[str, Any]:
        """Everything that makes this picture again, ready for JSON; neighbors as [id, similarity]."""
        return {
            **asdict(self.request),
            **self.model,
            **({} if self.pseudo_query is None else {"pseudo_query": self.pseudo_query}),
            "neighbors": [[found.image_id, found.similarity] for found in self.neighbors],
        }

    def provenance(self) -> dict[str, Any]:
        """The recipe with the neighbors spelled out: what each is, whose, and what it weighs."""
        return {**self.recipe(), "neighbors": [asdict(found) for found in self.neighbors]}


def read_prompts(name: str) -> tuple[str, ...]:
    """The prompts of a UTF-8 text file, in order. Raises UserError if it is missing or has none."""
    folder, _, file_name = name.rpartition("/")
    root = Root(folder or ".")
    if not root.exists(file_name):
        raise UserError(f"prompts_file = {name!r} is not there. Wanted: a text file with one prompt a line.")
    with root.open(file_name) as file:
        data = file.read()
    try:
        lines = [line.strip() for line in data.decode("utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise UserError(f"prompts_file = {name!r} is not UTF-8 text ({error}). Save it as UTF-8.") from error
    prompts = tuple(line for line in lines if line and not line.startswith("#"))
    if not prompts:
        raise UserError(f"prompts_file = {name!r} has no prompt. Wanted: one prompt a line.")
    return prompts


def prompts_digest(prompts: Sequence[str]) -> str:
    """Identity of a list of prompts: 16 hex digits."""
    return hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest()[:16]
