"""HTML of search results, samples, comparisons and signatures, from `views.html.jinja`; all outside text is escaped."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import Environment, FileSystemLoader

from jobs.explore.explorer import NeighborView, Progress
from trainer.evaluation.styles import style_words
from trainer.sampling.request import TRAINING_DATABASE

if TYPE_CHECKING:
    from retrieval.provenance import SignedPicture


@dataclass(frozen=True)
class SampleView:
    """A sample on the page. width: in pixels; png_url, link: the PNG, and the page that remakes it; relative.

    note: about the prompt, may be empty.
    """

    title: str
    prompt: str
    width: int
    png_url: str
    link: str
    facts: str
    note: str
    neighbors: Sequence[NeighborView]


@dataclass(frozen=True)
class AttributionView:
    """A sample with and without the rows that meet a condition. removed, added: neighbors of one of both only."""

    condition: str
    complete: SampleView
    without: SampleView
    clip_similarity: float
    pixel_difference: float
    removed: Sequence[NeighborView]
    added: Sequence[NeighborView]


def database_title(name: str) -> str:
    """The name of a database in words."""
    return "training database" if name == TRAINING_DATABASE else style_words(name)


_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
)
_TEMPLATES.filters["database_title"] = database_title


def _render(view: str, **values: object) -> str:
    return _TEMPLATES.get_template("views.html.jinja").render(view=view, **values)


def search_results(neighbors: Sequence[NeighborView], heading: str, link: str, note: str) -> str:
    """Neighbors, best first, under a heading. note: about the text, may be empty."""
    return _render("results", neighbors=neighbors, heading=heading, link=link, text_note=note)


def sample(picture: SampleView) -> str:
    return _render("sample", picture=picture)


def comparison(pictures: Sequence[SampleView], heading: str, link: str) -> str:
    """Samples of one prompt in a grid."""
    return _render("comparison", pictures=pictures, heading=heading, link=link)


def attribution(pair: AttributionView) -> str:
    """A sample with and without a group of neighbors."""
    return _render("attribution", pair=pair)


def verification(signed: "SignedPicture | None") -> str:
    """The signed statement of a picture, or that it has none."""
    return _render("verification", signed=signed)


def progress(steps: Progress) -> str:
    """The denoising steps that are done."""
    return _render("progress", done=min(steps.done, steps.total), total=steps.total)


def note(text: str) -> str:
    return _render("note", text=text)


def error(text: str) -> str:
    return _render("error", text=text)
