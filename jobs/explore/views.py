"""What the page shows of an answer, as HTML with everything from outside escaped.

Takes what the explorer answers; the words and tags stand in `views.html.jinja`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader

from jobs.explore.explorer import Shown
from trainer.evaluation.styles import style_words
from trainer.sampling.request import TRAINING_DATABASE

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Drawn:
    """A picture that was made.

    width: in pixels; place: where it can be fetched; link: the page's, to make it again.
    """

    title: str
    prompt: str
    width: int
    place: str
    link: str
    facts: str
    neighbors: Sequence[Shown]


def words(name: str) -> str:
    """A database's name for people."""
    return "training database" if name == TRAINING_DATABASE else style_words(name)


_TEMPLATES = Environment(
    loader=FileSystemLoader(FOLDER), autoescape=True, trim_blocks=True, lstrip_blocks=True
)
_TEMPLATES.filters["words"] = words


def _render(what: str, **values: object) -> str:
    return _TEMPLATES.get_template("views.html.jinja").render(what=what, **values)


def found(neighbors: Sequence[Shown], heading: str, link: str) -> str:
    """Neighbors, best first, under a heading."""
    return _render("found", neighbors=neighbors, heading=heading, link=link)


def drawn(one: Drawn) -> str:
    """A picture beside the neighbors that made it."""
    return _render("drawn", one=one)


def compared(pictures: Sequence[Drawn], heading: str, link: str) -> str:
    """Pictures of one prompt side by side."""
    return _render("compared", pictures=pictures, heading=heading, link=link)


def problem(text: str) -> str:
    """What went wrong, for whoever asked."""
    return _render("problem", text=text)
