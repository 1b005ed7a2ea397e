"""What a visitor may ask, the same by GET, by POST and in the page's links.

Plain records with the checks that need nothing opened; `jobs.explore.explorer` answers them.
"""

import base64
import binascii
from collections.abc import Sequence
from typing import Any, TypeVar
from urllib.parse import urlencode

from pydantic import BaseModel, ConfigDict, Field
from starlette.datastructures import QueryParams

from jobs.explore.config import ExploreConfig
from retrieval.errors import UserError
from trainer.model.context import Mode
from trainer.recipe import SchedulerName
from trainer.sampling.request import MAX_SEED, TRAINING_DATABASE, Sample


class Ask(BaseModel):
    """Unknown names are refused, so that a misspelled one is not silently without effect."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


MAX_IDS = 1000
"""Most neighbors that a request leaves out or weighs."""
Asked = TypeVar("Asked", bound=Ask)


class SearchAsk(Ask):
    """A search for neighbors: by a text, by a picture, or by both together."""

    text: str = ""
    """What to look for, in words."""
    image: str = ""
    """A picture file in base64."""
    database: str = TRAINING_DATABASE
    """A name that /databases lists; `index` is the training database."""
    k: int = Field(default=20, ge=1)
    """Neighbors wanted."""
    recall: float = Field(default=0.95, gt=0, le=1)
    """Share of the true neighbors wanted: less is faster."""

    def check(self, limits: ExploreConfig) -> None:
        """Raises UserError for what is more than anybody may ask."""
        _require_text(self.text, limits)
        _at_most("k", self.k, limits.max_k)
        if not self.text.strip() and not self.image:
            raise UserError("Nothing to search for: type some words or give a picture.")

    def link(self) -> str:
        """The page's address that fills its form with this and runs it; a picture is left out."""
        return _address("search", self.model_dump(exclude_defaults=True, exclude={"image"}))


class SampleAsk(Ask):
    """A picture to make. What is left out is as the recipe's [sample] says."""

    prompt: str = ""
    """What the picture shows; may be empty where `images` or `vectors` are given."""
    mix: list[str] = []
    """Databases of the neighbors: `woodcut`, or with weights `woodcut:2`, `neon:1`; none: `index`."""
    mode: Mode = "text_and_neighbors"
    """What the model is told."""
    k: int | None = Field(default=None, ge=1)
    """Neighbors from each database."""
    guidance: float | None = Field(default=None, ge=0, le=100)
    """Scale of classifier-free guidance; 1 is none."""
    steps: int | None = Field(default=None, ge=1)
    """Denoising steps."""
    scheduler: SchedulerName | None = None
    """The sampler's method."""
    seed: int = Field(default=0, ge=0, le=MAX_SEED)
    """Of the noise: the same seed and settings make the same picture."""
    exclude: list[int] = []
    """Image ids that are never used; the next best come instead."""
    weights: list[str] = []
    """Image ids with factors on what they weigh as neighbors: `123:0.5` halves, `123:0` leaves out."""
    top_m: float = Field(default=1.0, gt=0, le=1)
    """Mode `unconditional`: the share of the most retrieved images that pseudo-queries are drawn from."""
    images: list[str] = []
    """Picture files in base64 that condition the sample."""
    vectors: list[str] = []
    """The same by their CLIP vectors, base64 of float32, as an earlier answer's recipe has them."""

    def check(self, limits: ExploreConfig) -> None:
        """Raises UserError for what is more than anybody may ask."""
        _require_text(self.prompt, limits)
        _at_most("k", self.k or 1, limits.max_k)
        _at_most("steps", self.steps or 1, limits.max_steps)
        _at_most("mix (databases)", len(self.mix), limits.max_styles)
        _at_most("exclude and weights (ids)", len(self.exclude) + len(self.weights), MAX_IDS)
        _at_most("images", len(self.images) + len(self.vectors), limits.max_images)

    def weighted(self) -> list[tuple[str, float]]:
        """The databases of `mix` with their weights. Raises UserError for a weight that is none."""
        return [_weighted(one) for one in self.mix]

    def factors(self) -> list[tuple[int, float]]:
        """The ids of `weights` with their factors. Raises UserError for what is none."""
        try:
            return [(int(name), factor) for name, factor in map(_weighted, self.weights)]
        except ValueError as error:
            raise UserError(f"weights: wanted id:factor as in '123:0.5', got {self.weights}.") from error

    def link(self, sample: Sample | None = None, tab: str = "make") -> str:
        """The page's address that fills a tab's form with this and runs it.

        sample: what was made of this; it says what was left out here, and its pictures as vectors.
        """
        fields = self.model_dump(exclude_defaults=True, exclude={"images"})
        if sample is not None:
            request = sample.request
            fields |= {"mix": self.mix or [*request.shares()], "k": request.k}
            fields |= {"guidance": request.guidance, "steps": request.steps}
            fields |= {"scheduler": request.scheduler, "vectors": [one.vector for one in request.images]}
        return _address(tab, fields)


def bytes_of(text: str, limits: ExploreConfig) -> bytes:
    """The file in a base64 text. Raises UserError where it is none, or more than is taken."""
    _at_most("a picture's bytes", len(text) * 3 // 4 - 2, limits.max_upload_bytes)
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise UserError(f"A picture must be the base64 of a picture file: {error}.") from error


def from_query(kind: type[Asked], query: QueryParams) -> Asked:
    """What an address asks. Raises pydantic's ValidationError for a value that is none."""
    lists = [name for name, field in kind.model_fields.items() if field.default == []]
    fields = {name: query.getlist(name) if name in lists else query[name] for name in query if name != "tab"}
    return kind.model_validate(fields)


def encoded_mix(names: Sequence[str], weights: Sequence[float | None]) -> list[str]:
    """Databases and weights as `mix` takes them, those without a name left out."""
    return [
        name if weight == 1 else f"{name}:{0 if weight is None else weight!r}"
        for name, weight in zip(names, weights, strict=True)
        if name
    ]


def _address(tab: str, fields: dict[str, Any]) -> str:
    return f"/?{urlencode({'tab': tab, **fields}, doseq=True)}"


def _weighted(text: str) -> tuple[str, float]:
    name, _, weight = text.partition(":")
    try:
        return name, float(weight or 1)
    except ValueError:
        raise UserError(f"{text!r}: wanted name:weight, as in 'neon:2'.") from None


def _require_text(text: str, limits: ExploreConfig) -> None:
    _at_most("the text's characters", len(text), limits.max_text)


def _at_most(word: str, found: int, most: int) -> None:
    if found > most:
        raise UserError(f"Too much of {word}: {found:,}, and {most:,} is the most here.")
