"""Requests to the API, by GET, by POST and in links to the page, with the checks that need no opened database."""

import base64
import binascii
from collections.abc import Sequence
from typing import Any, TypeVar
from urllib.parse import urlencode

from pydantic import BaseModel, ConfigDict, Field
from starlette.datastructures import QueryParams

from jobs.cli.explore_config import ExploreConfig
from retrieval.clip.texts import require_unicode
from retrieval.errors import UserError
from trainer.model.context import Mode
from trainer.model.recipe import SchedulerName
from trainer.sampling.request import MAX_SEED, MAX_WEIGHT, TRAINING_DATABASE, Sample


class ApiRequest(BaseModel):
    """Unknown fields are rejected, so that a misspelled field is not ignored."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


MAX_IDS = 1000
"""Maximum number of neighbors that a request excludes or weighs."""
AnyRequest = TypeVar("AnyRequest", bound=ApiRequest)


class SearchRequest(ApiRequest):
    """A search for neighbors: by a text, by a picture, or by both together."""

    text: str = ""
    """Query text."""
    image: str = ""
    """Query picture: a picture file in base64."""
    database: str = TRAINING_DATABASE
    """Name of a database, as /databases lists it; `index` is the training database."""
    k: int = Field(default=20, ge=1)
    """Number of neighbors."""
    recall: float = Field(default=0.95, gt=0, le=1)
    """Share of the true neighbors to find; a lower recall is faster."""
    where: str = ""
    """Condition on the metadata, such as `width >= 512 and 'sea' in caption`; empty: all rows."""

    def check(self, limits: ExploreConfig) -> None:
        """Raises UserError for a request above the limits, or without a query."""
        _require_text(self.text, limits)
        _require_text(self.where, limits)
        _require_at_most("k", self.k, limits.max_k)
        if not self.text.strip() and not self.image:
            raise UserError("Nothing to search for: type some words or choose a picture.")

    def link(self) -> str:
        """The link to the page that fills the form and runs this search; a picture is left out."""
        return _page_path("search", self.model_dump(exclude_defaults=True, exclude={"image"}))


class SampleRequest(ApiRequest):
    """A picture to make. The recipe's section [sample] gives the defaults."""

    prompt: str = ""
    """Text prompt; may be empty if `images` or `vectors` are given."""
    mix: list[str] = []
    """Databases of the neighbors: `woodcut`, or with weights `woodcut:2`, `neon:1`; empty means `index`."""
    mode: Mode = "text_and_neighbors"
    """What conditions the model."""
    k: int | None = Field(default=None, ge=1)
    """Number of neighbors from each database."""
    guidance: float | None = Field(default=None, ge=0, le=100)
    """Scale of classifier-free guidance; 1 means no guidance."""
    steps: int | None = Field(default=None, ge=1)
    """Denoising steps."""
    scheduler: SchedulerName | None = None
    """Sampling method."""
    seed: int = Field(default=0, ge=0, le=MAX_SEED)
    """Seed of the noise; the same seed and settings make the same picture."""
    exclude: list[int] = []
    """Image ids that are not used as neighbors; the next best rows take their places."""
    without: str = ""
    """Condition on the metadata of rows that are not used as neighbors, such as `artist == 'Ann'`; empty: none."""
    weights: list[str] = []
    """Image ids with factors on their weights as neighbors: `123:0.5` halves, `123:0` leaves out."""
    top_m: float = Field(default=1.0, gt=0, le=1)
    """Mode `unconditional`: share of the most retrieved images from which pseudo-queries are drawn."""
    images: list[str] = []
    """Picture files in base64 that condition the sample."""
    vectors: list[str] = []
    """CLIP vectors that condition the sample, float32 in base64, as in the recipe of an earlier answer."""

    def check(self, limits: ExploreConfig) -> None:
        """Raises UserError for a request above the limits."""
        _require_text(self.prompt, limits)
        _require_text(self.without, limits)
        _require_at_most("k", self.k or 1, limits.max_k)
        _require_at_most("steps", self.steps or 1, limits.max_steps)
        _require_at_most("mix (databases)", len(self.mix), limits.max_styles)
        _require_at_most("exclude and weights (ids)", len(self.exclude) + len(self.weights), MAX_IDS)
        _require_at_most("images", len(self.images) + len(self.vectors), limits.max_condition_images)

    def databases(self) -> list[tuple[str, float]]:
        """The databases of `mix` with their weights. Raises UserError for a weight that is no number above 0."""
        weighted = [_name_and_weight(entry) for entry in self.mix]
        for entry, (_, weight) in zip(self.mix, weighted, strict=True):
            if not 0 < weight < MAX_WEIGHT:  # also true for nan
                raise UserError(f"mix: {entry!r} has the weight {weight:g}. Wanted: above 0, below {MAX_WEIGHT:g}.")
        return weighted

    def id_factors(self) -> list[tuple[int, float]]:
        """The ids of `weights` with their factors. Raises UserError for an entry that is not id:factor."""
        try:
            return [(int(name), factor) for name, factor in map(_name_and_weight, self.weights)]
        except ValueError as error:
            raise UserError(f"weights: wanted id:factor as in '123:0.5', got {self.weights}.") from error

    def link(self, sample: Sample | None = None, tab: str = "make") -> str:
        """The link to the page that fills the form of a tab and runs this request, relative to the page's URL.

        sample: the result of this request; it supplies the defaults, and the pictures as vectors.
        """
        fields = self.model_dump(exclude_defaults=True, exclude={"images"})
        if sample is not None:
            request = sample.request
            fields |= {"mix": self.mix or [*request.database_weights()], "k": request.k}
            fields |= {"guidance": request.guidance, "steps": request.steps}
            fields |= {"scheduler": request.scheduler, "vectors": [image.vector for image in request.images]}
        return _page_path(tab, fields)


class ErrorResponse(BaseModel):
    """The answer to a request that fails."""

    detail: str


class VerifyRequest(ApiRequest):
    """A picture, to be checked for a signed statement of its origin."""

    image: str
    """A PNG or JPEG file in base64."""


def decode_base64(text: str, limits: ExploreConfig) -> bytes:
    """The file in a base64 text. Raises UserError if it is not base64, or too large."""
    _require_at_most("bytes in a picture", len(text) * 3 // 4 - 2, limits.max_upload_bytes)
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise UserError(f"A picture must be the base64 of a picture file: {error}.") from error


def from_query(kind: type[AnyRequest], query: QueryParams) -> AnyRequest:
    """The request in the query of a URL. Raises pydantic's ValidationError for an invalid value."""
    lists = [name for name, field in kind.model_fields.items() if field.default == []]
    fields = {name: query.getlist(name) if name in lists else query[name] for name in query if name != "tab"}
    return kind.model_validate(fields)


def first_problem(errors: Sequence[Any]) -> str:
    """The first of pydantic's errors as text: the field, what is wrong, and the start of the value."""
    first = errors[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}, got {str(first['input'])[:80]!r}."


def encode_mix(names: Sequence[str], weights: Sequence[float | None]) -> list[str]:
    """Databases and weights as `mix` takes them; empty names are left out."""
    return [
        name if weight == 1 else f"{name}:{0 if weight is None else weight!r}"
        for name, weight in zip(names, weights, strict=True)
        if name
    ]


def _page_path(tab: str, fields: dict[str, Any]) -> str:
    return f"?{urlencode({'tab': tab, **fields}, doseq=True)}"


def _name_and_weight(text: str) -> tuple[str, float]:
    name, _, weight = text.partition(":")
    try:
        return name, float(weight or 1)
    except ValueError:
        raise UserError(f"{text!r}: wanted name:weight, as in 'neon:2'.") from None


def _require_text(text: str, limits: ExploreConfig) -> None:
    _require_at_most("characters in the text", len(text), limits.max_text_characters)
    require_unicode([text])


def _require_at_most(name: str, number: int, limit: int) -> None:
    if number > limit:
        raise UserError(f"Too many {name}: got {number:,}, the limit of this server is {limit:,}.")
