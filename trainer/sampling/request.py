"""Input and output of the sampler as plain records: a request, its neighbors, a finished sample.

Also reads prompts files. A sample's recipe holds every value that is needed to reproduce the picture, except the files
of image-to-image sampling, which it names.
"""

import base64
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from typing import Any

import numpy as np
from PIL import Image
from pydantic import TypeAdapter, ValidationError

from retrieval.clip.texts import require_unicode
from retrieval.errors import UserError
from retrieval.index.conditions import parse_condition
from retrieval.storage.root import Root
from trainer.model.context import Mode, Vectors
from trainer.model.recipe import SchedulerName

TRAINING_DATABASE = "index"
MAX_SEED = 2**32 - 1
"""torch's CPU generator uses 32 bits of a seed: larger seeds would repeat pictures."""
MAX_WEIGHT = 1e6
MAX_EDGE = 2**14
"""Pixels of a picture's edge: with more, no machine has enough memory for the network."""
FULL = (0.0, 1.0)
"""The interval of all noise levels."""
ADDED = {
    **{"negative_prompt": "", "guidance_interval": FULL, "without": ""},
    **{"neighbor_weight": 1.0, "init_image": None, "strength": 1.0, "mask": None},
}
"""Fields that the recipe of a picture has only with other values, so that equal pictures have equal files."""


@dataclass(frozen=True)
class ImageQuery:
    """An image to condition on, stored as its embedding, so that a recipe does not need the file."""

    name: str
    """File name or other label."""
    sha256: str
    """SHA-256 of the file in hex."""
    vector: str
    """Base64 of the CLIP vector (dim,) at its length, float32, little-endian."""

    @classmethod
    def from_file(cls, name: str, data: bytes, vector: Vectors) -> "ImageQuery":
        """data: bytes of the image file; vector: its embedding (dim,)."""
        encoded = base64.b64encode(vector.astype("<f4").tobytes()).decode()
        return cls(name, hashlib.sha256(data).hexdigest(), encoded)

    @property
    def embedding(self) -> Vectors:
        """(dim,) float32. Raises UserError if `vector` is not base64 of float32 values."""
        try:
            return np.frombuffer(base64.b64decode(self.vector, validate=True), "<f4").astype(np.float32)
        except ValueError as error:
            raise UserError(f"the vector of image {self.name!r} is not base64 of float32: {error}") from error


@dataclass(frozen=True)
class SourceImage:
    """A picture file to start from, or a mask. A sample's recipe names the file and does not contain it."""

    name: str = field(compare=False)
    """File name or other label."""
    sha256: str
    """SHA-256 of the file in hex."""
    data: bytes = field(default=b"", repr=False, compare=False)
    """The file."""

    @classmethod
    def of(cls, name: str, data: bytes) -> "SourceImage":
        """data: bytes of the file."""
        return cls(name, hashlib.sha256(data).hexdigest(), data)

    @cached_property
    def picture(self) -> Image.Image:
        """The picture, upright, RGB. Raises UserError if the file is missing or cannot be decoded."""
        return self._decode("white")

    @cached_property
    def as_mask(self) -> Image.Image:
        """As `picture`, but transparent pixels are black, which a mask keeps."""
        return self._decode("black")

    def _decode(self, background: str) -> Image.Image:
        from retrieval.pictures.picture_file import decode_picture

        if not self.data:
            raise UserError(f"the recipe does not contain the picture {self.name!r} (SHA-256 {self.sha256}): add it.")
        return decode_picture(self.name, self.data, background)


@dataclass(frozen=True)
class Request:
    """One picture to sample."""

    prompt: str
    """Query of the search and, unless the mode is `neighbors`, a token of the context. May be empty if
    there are images or the mode is `unconditional`."""
    seed: int = 0
    """Seed of the initial noise, 0 .. MAX_SEED. The picture does not depend on the batch."""
    mode: Mode = "text_and_neighbors"
    """What the context holds: see `trainer.model.context.make_context`."""
    database: str = TRAINING_DATABASE
    """A name below `databases/`, or `index` for the training database; unused in mode `text`."""
    k: int = 19
    """Neighbors to retrieve."""
    guidance: float = 5.0
    """Scale s of classifier-free guidance; 1 is no guidance."""
    negative_prompt: str = ""
    """Text that guidance moves away from, in the place of the empty context; empty: none."""
    guidance_interval: tuple[float, float] = FULL
    """Guidance only at noise levels t / (T - 1) from the first to the second number."""
    neighbor_weight: float = 1.0
    """Factor on the weight of all neighbors in attention: below 1, prompt and images count more."""
    steps: int = 50
    """Denoising steps, from 1 to the timesteps of training."""
    scheduler: SchedulerName = "ddim"
    height: int = 0
    """Height of the picture in pixels; 0 for the training size."""
    width: int = 0
    """Width of the picture in pixels; 0 for the training size."""
    mix: tuple[tuple[str, float], ...] = ()
    """(database, weight above 0), replaces `database`: each database contributes k neighbors. Their weight in
    attention is the database's share of the sum, so a mix counts as much as a single database."""
    images: tuple[ImageQuery, ...] = ()
    """Images to condition on: each is a token, and the search query is the mean of all query tokens."""
    exclude: tuple[int, ...] = ()
    """Image ids that are not used as neighbors; the next best replace them."""
    without: str = ""
    """Condition on the metadata, see `parse_condition`: rows that meet it are not used as neighbors; empty: none."""
    weights: tuple[tuple[int, float], ...] = ()
    """(image id, factor): multiplies a neighbor's weight in attention; 0 removes the neighbor."""
    top_m: float = 1.0
    """Mode `unconditional`: share of the most retrieved images to draw a query from, above 0, at most 1."""
    init_image: SourceImage | None = None
    """Picture to start from, scaled and cropped around its center to the size of the sample; None: noise."""
    strength: float = 1.0
    """Share of the steps that are computed, 0..1: they start at `init_image` with noise. 0 returns `init_image` as the
    autoencoder decodes it, 1 starts at pure noise."""
    mask: SourceImage | None = None
    """Picture of the size of `init_image`, white where it is drawn again. All other latents stay as they are.
    Transparent pixels count as black."""

    @classmethod
    def from_recipe(cls, recipe: Mapping[str, Any]) -> "Request":
        """The request of a sample's recipe, decoded from JSON. Raises UserError for values of wrong types."""
        names = {entry.name for entry in fields(cls)}
        values = {name: value for name, value in recipe.items() if name in names}
        require_unicode(value for value in values.values() if isinstance(value, str))
        try:
            return TypeAdapter(cls).validate_json(json.dumps(values), strict=True)
        except ValidationError as error:
            problem = _first_problem(error)
        except (TypeError, ValueError, RecursionError) as error:
            problem = str(error)
        raise UserError(f"not the recipe of a sample: {problem}. Name a picture as 'make sample' wrote it.")

    def database_weights(self) -> dict[str, float]:
        """Weight of a neighbor by its database, summing to 1. Empty in mode `text`."""
        if self.mode == "text":
            return {}
        mix = self.mix or ((self.database, 1.0),)
        total = sum(weight for _, weight in mix)
        return {name: weight / total for name, weight in mix}

    def check(self) -> None:
        """Raises UserError for values that are invalid for every model."""
        if self.prompt:
            require_text(self.prompt)
        elif not (self.images or self.mode == "unconditional"):
            raise UserError("nothing to condition on: set a prompt, an image, or mode 'unconditional'.")
        self._check_guidance()
        self._check_source()
        self._check_without()
        if not 0 <= self.seed <= MAX_SEED:
            raise UserError(f"a seed must be 0 to {MAX_SEED}, got {self.seed}")
        if not max(self.height, self.width) <= MAX_EDGE:
            raise UserError(f"height and width must be at most {MAX_EDGE}, got {self.height} and {self.width}")
        if self.k < 1:
            raise UserError(f"k must be at least 1, got {self.k}")
        if not 0 < self.top_m <= 1:
            raise UserError(f"top_m must be above 0 and at most 1, got {self.top_m}")
        if len(dict(self.mix)) < len(self.mix) or not all(0 < weight < MAX_WEIGHT for _, weight in self.mix):
            raise UserError(f"mix must name each database once, with a weight above 0, got {dict(self.mix)}")
        if not 0 < self.neighbor_weight < MAX_WEIGHT:
            raise UserError(f"neighbor_weight must be above 0 and below {MAX_WEIGHT:g}, got {self.neighbor_weight:g}")
        if not all(0 <= factor < MAX_WEIGHT for _, factor in self.weights):
            raise UserError(f"weights of neighbors must be 0 to {MAX_WEIGHT:g}, got {dict(self.weights)}")

    def _check_guidance(self) -> None:
        if not math.isfinite(self.guidance):
            raise UserError(f"guidance must be a finite number, got {self.guidance}")
        low, high = self.guidance_interval
        if not 0 <= low < high <= 1:
            raise UserError(f"guidance_interval must be two increasing numbers from 0 to 1, got {low:g} and {high:g}")
        if self.negative_prompt:
            require_text(self.negative_prompt)
            if self.guidance == 1:
                raise UserError("a negative prompt has no effect without guidance: set guidance above 1.")

    def _check_without(self) -> None:
        if self.without:
            parse_condition(self.without)
            if self.mode == "text":
                raise UserError("without has no effect in mode 'text': the picture has no neighbors to leave out.")

    def _check_source(self) -> None:
        if not 0 <= self.strength <= 1:
            raise UserError(f"strength must be 0 to 1, got {self.strength:g}")
        if self.init_image is None:
            if self.mask or self.strength < 1:
                raise UserError("mask and strength have no effect without a picture to start from: set init_image.")
            return
        size = self.init_image.picture.size
        if self.mask and self.mask.as_mask.size != size:
            (width, height), (wide, high) = size, self.mask.as_mask.size
            raise UserError(
                f"mask {self.mask.name!r} is {wide} x {high}, {self.init_image.name!r} is {width} x {height}. "
                "Make the mask as large as the picture."
            )


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
    """Weight in attention; prompt and images have weight 1."""
    details: dict[str, Any] = field(default_factory=dict)
    """Further metadata in the database: license, title, artist, source, box."""
    norm: float | None = None
    """Length of its CLIP vector before normalization; None if unknown."""


@dataclass(frozen=True)
class Sample:
    """A finished picture with its request, its neighbors and the identity of the model."""

    request: Request
    picture: Image.Image
    neighbors: tuple[Neighbor, ...]
    """By database, best first; empty in mode `text`."""
    model_identity: dict[str, str]
    """Checksums `model`, `encoder` and `autoencoder`, and the `precision`."""
    pseudo_query: int | None = None
    """Mode `unconditional`: id of the image used as the query."""
    database_identities: dict[str, str] = field(default_factory=dict)
    """Digest of each searched database, by name."""

    def recipe(self) -> dict[str, Any]:
        """All values needed to reproduce this picture, ready for JSON; neighbors as [id, similarity]."""
        request = {name: value for name, value in asdict(self.request).items() if ADDED.get(name) != value}
        for name in ("init_image", "mask"):
            if name in request:
                del request[name]["data"]
        return {
            **request,
            **self.model_identity,
            **({} if self.pseudo_query is None else {"pseudo_query": self.pseudo_query}),
            "neighbors": [[neighbor.image_id, neighbor.similarity] for neighbor in self.neighbors],
        }

    def detailed_recipe(self) -> dict[str, Any]:
        """The recipe with all fields of each neighbor."""
        return {**self.recipe(), "neighbors": [asdict(neighbor) for neighbor in self.neighbors]}


def _first_problem(error: ValidationError) -> str:
    """The first wrong field, the start of its value and what is wanted."""
    first = error.errors()[0]
    field_name = ".".join(map(str, first["loc"])) or "recipe"
    if first["type"] == "missing":
        return f"field {field_name} is missing"
    return f"field {field_name} is {repr(first['input'])[:80]}. {first['msg']}"


def database_folder(name: str) -> str:
    """Folder of a database below the root, by its name in requests.

    >>> database_folder("index"), database_folder("woodcut")
    ('index', 'databases/woodcut')
    """
    return name if name == TRAINING_DATABASE else f"databases/{name}"


def require_text(prompt: str) -> None:
    """Raise UserError for a prompt without a visible character, such as blanks, or with a lone surrogate.

    >>> require_text("a stag")
    """
    require_unicode([prompt])
    # isprintable() is false for control and format characters and for all spaces but the ASCII one
    if not any(character.isprintable() and character != " " for character in prompt):
        raise UserError(f"the prompt {prompt!r} has no visible character. Write what the picture shows.")


def read_prompts(name: str) -> tuple[str, ...]:
    """The prompts of a UTF-8 text file, in order, without empty lines and comments (#).

    Raises UserError if the file is missing or has no prompt.
    """
    folder, _, file_name = name.rpartition("/")
    root = Root(folder or ".")
    if not root.exists(file_name):
        raise UserError(f"prompts_file = {name!r} does not exist. Set it to a text file with one prompt a line.")
    with root.open(file_name) as file:
        data = file.read()
    try:
        lines = [line.strip() for line in data.decode("utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise UserError(f"prompts_file = {name!r} is not UTF-8 text ({error}). Save it as UTF-8.") from error
    prompts = tuple(line for line in lines if line and not line.startswith("#"))
    for prompt in prompts:
        require_text(prompt)
    if not prompts:
        raise UserError(f"prompts_file = {name!r} has no prompt. Write one prompt a line.")
    return prompts


def prompts_digest(prompts: Sequence[str]) -> str:
    """Hash of a list of prompts, 16 hex digits."""
    return hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest()[:16]
