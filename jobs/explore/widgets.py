"""What the page's tabs share: the explorer at hand, uploads, mistakes shown as answers, choices by name."""

import base64
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from pydantic import ValidationError
from starlette.datastructures import QueryParams

from jobs.explore import views
from jobs.explore.explorer import Explorer
from jobs.explore.png_cache import Made
from jobs.explore.work_queue import Refused
from retrieval.errors import UserError
from trainer.sampling.request import TRAINING_DATABASE

Answer = Callable[..., Awaitable[str]]
EVENT: dict[str, Any] = {"api_visibility": "private", "concurrency_limit": None, "scroll_to_output": True}
"""Of every event: the API is ours, the limits stand in the explorer, and a phone shows what came."""


@dataclass(frozen=True)
class Desk:
    """What every tab works with."""

    explorer: Explorer
    made: Made

    @property
    def choices(self) -> list[tuple[str, str]]:
        """All databases, as people call them and by name; styles first."""
        last = [name for name in self.explorer.databases if name == TRAINING_DATABASE]
        return [(views.words(name), name) for name in [*self.explorer.styles, *last]]

    @property
    def first(self) -> str:
        """The database that a form begins with."""
        return self.choices[0][1]


@dataclass(frozen=True)
class Tab:
    """A tab as it stands on the page."""

    name: str
    fields: list[gr.components.Component]
    """Its form, in order."""
    answer: Answer
    """From the form's values to what `shown` shows."""
    shown: gr.HTML
    values: Callable[[QueryParams], list[Any]]
    """The form's values that an address asks for. Raises pydantic's ValidationError for what is none."""


def upload(label: str) -> gr.Image:
    """A place to drop a picture. What it gives is the path of a file that nothing has opened yet."""
    made = gr.Image(label=label, type="filepath", sources=["upload", "clipboard"], height=180)
    # Gradio's own opens the file, and has no words for one that is no picture
    made.preprocess = _path_of  # type: ignore[method-assign]
    move = made.async_move_resource_to_block_cache

    async def moved(path: str | Path | None) -> str | None:
        # Gradio's own fetches an address, from this machine and however large it is
        if str(path).startswith(("http://", "https://")):
            raise gr.Error("Upload the file itself.")
        return await move(path)

    made.async_move_resource_to_block_cache = moved  # type: ignore[method-assign, assignment]
    return made


def encoded(path: str | None) -> str:
    """An uploaded file in base64, as the API takes it; empty for none."""
    return "" if path is None else base64.b64encode(Path(path).read_bytes()).decode()


def _path_of(payload: Any) -> str | None:
    return None if payload is None else str(payload.path)


def told(answer: Answer) -> Answer:
    """The same, with a mistake shown in the place of an answer."""

    async def shown(*values: Any) -> str:
        try:
            return await answer(*values)
        except ValidationError as error:
            return views.problem(mistake(error))
        except (UserError, Refused) as error:
            return views.problem(str(error))

    return shown


def mistake(error: ValidationError) -> str:
    """The first thing that is wrong with a form or an address."""
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}, got {str(first['input'])[:80]!r}."
