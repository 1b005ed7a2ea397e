"""What the tabs share: the page's context, fields, progress by step, and error messages in place of results."""

import asyncio
import base64
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from pydantic import ValidationError
from starlette.datastructures import QueryParams

from jobs.explore.api_models import first_problem
from jobs.explore.explorer import Explorer, Progress
from jobs.explore.guard import UPLOAD_LIFETIME_S
from jobs.explore.png_cache import PngCache
from jobs.explore.tabs import views
from jobs.explore.visits import Visits
from jobs.explore.work_queue import BusyError
from retrieval.errors import UserError
from trainer.sampling.request import TRAINING_DATABASE

Work = Callable[..., Coroutine[Any, Any, str]]
"""Makes the HTML of a result. Arguments: the progress of its sampling, then the values of a form."""
Answer = Callable[..., AsyncIterator[str]]
"""Makes HTML of Gradio's request, and of the values that `Tab.values_of` returns or of those of the fields: the
progress of sampling, and at last the result."""
PROGRESS_S = 0.5
"""Seconds between two displays of the progress."""
EVENT_OPTIONS: dict[str, Any] = {
    "api_visibility": "private",  # our own API replaces Gradio's
    "concurrency_limit": None,  # the explorer's queues limit the work
    "scroll_to_output": True,  # on a phone the result is below the form
}
"""Options of every event that shows a result."""


@dataclass(frozen=True)
class PageContext:
    """What every tab works with."""

    explorer: Explorer
    cache: PngCache
    visits: Visits

    @property
    def choices(self) -> list[tuple[str, str]]:
        """(title, name) of all databases; the training database is the last."""
        last = [name for name in self.explorer.databases if name == TRAINING_DATABASE]
        return [(views.database_title(name), name) for name in [*self.explorer.styles, *last]]

    @property
    def first_database(self) -> str:
        """The database that a form selects at first."""
        return self.explorer.first_search.database


@dataclass(frozen=True)
class Tab:
    """A tab of the page."""

    name: str
    fields: list[gr.components.Component]
    """The fields of its form, in order."""
    answer: Answer
    output: gr.HTML
    values_of: Callable[[QueryParams], list[Any]]
    """Values of the fields for the query of a URL, and after them values that have no field.
    Raises pydantic's ValidationError or UserError for an invalid query."""


def upload_field(label: str) -> gr.Image:
    """A field for a picture file. Its value is the path of the file, which nothing has opened yet."""
    field = gr.Image(label=label, type="filepath", sources=["upload", "clipboard"], height=180)
    # Gradio's own preprocessing opens the file, and fails without a message if it is not a picture.
    field.preprocess = _path_of  # type: ignore[method-assign]
    move = field.async_move_resource_to_block_cache

    async def move_uploads_only(path: str | Path | None) -> str | None:
        # Gradio would download a URL of any size from this machine.
        if str(path).startswith(("http://", "https://")):
            raise gr.Error("Upload the file itself.")
        return await move(path)

    field.async_move_resource_to_block_cache = move_uploads_only  # type: ignore[method-assign, assignment]
    return field


def file_as_base64(path: str | None) -> str:
    """An uploaded file in base64, as the API takes it; empty for no file. Raises UserError if it was deleted."""
    try:
        return "" if path is None else base64.b64encode(Path(path).read_bytes()).decode()
    except FileNotFoundError as error:
        kept = UPLOAD_LIFETIME_S // 60
        raise UserError(f"The uploaded picture has expired: it is kept for {kept} minutes. Upload it again.") from error


def _path_of(payload: Any) -> str | None:
    return None if payload is None else str(payload.path)


def page_event(context: PageContext, work: Work) -> Answer:
    """The work as an event of the page, which shows its progress and errors.

    It is cancelled when the visitor leaves or cancels it.
    """

    async def answer(request: gr.Request, *values: Any) -> AsyncIterator[str]:
        progress = Progress()
        run = context.visits.run(request.session_hash or "", work(progress, *values), views.note("Cancelled."))
        task = asyncio.create_task(run)
        try:
            while not (await asyncio.wait({task}, timeout=PROGRESS_S))[0]:
                if progress.total:
                    yield views.progress(progress)
            yield task.result()
        except (ValidationError, UserError, BusyError) as error:
            yield views.error(error_text(error))
        finally:
            task.cancel()

    return answer


def visit_end(context: PageContext) -> Callable[[gr.Request], Coroutine[Any, Any, None]]:
    """The event that cancels all work of a visitor."""

    async def end(request: gr.Request) -> None:
        context.visits.end(request.session_hash or "")

    return end


def add_cancel_button(context: PageContext) -> None:
    """A button that cancels the work of its visitor."""
    button = gr.Button("Cancel")
    button.click(visit_end(context), None, None, api_visibility="private", concurrency_limit=None)


def add_examples(context: PageContext, field: gr.Textbox) -> None:
    """Example texts that fill the field when they are chosen; the first is its hint."""
    examples = context.explorer.examples
    if examples:
        field.placeholder = examples[0]
        gr.Examples([[text] for text in examples], [field], api_visibility="private")


def error_text(error: Exception) -> str:
    """The message of an error; of a ValidationError, the first invalid field."""
    return first_problem(error.errors()) if isinstance(error, ValidationError) else str(error)
