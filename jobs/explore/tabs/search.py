"""The search tab: a text or a picture as the query, the neighbors in one database as the result."""

from collections.abc import Sequence
from typing import Any

import gradio as gr
from starlette.datastructures import QueryParams

from jobs.explore.api_models import SearchRequest, from_query
from jobs.explore.explorer import NeighborView, Progress
from jobs.explore.tabs import views
from jobs.explore.tabs.widgets import (
    EVENT_OPTIONS,
    PageContext,
    Tab,
    add_examples,
    file_as_base64,
    page_event,
    upload_field,
)
from retrieval.index.conditions import EXAMPLE


def add_tab(context: PageContext) -> Tab:
    """Add the form and its events to the page."""
    limits = context.explorer.limits
    with gr.Row():
        with gr.Column(scale=3, min_width=260):
            text = gr.Textbox(label="Text", max_length=limits.max_text_characters)
            database = gr.Dropdown(context.choices, value=context.first_database, label="Database", filterable=False)
            where = gr.Textbox(label="Only rows where", placeholder=EXAMPLE, max_length=limits.max_text_characters)
            k = gr.Slider(1, limits.max_k, context.explorer.first_search.k, step=1, label="Neighbors")
            button = gr.Button("Search", variant="primary")
            add_examples(context, text)
        with gr.Column(scale=2, min_width=220):
            image = upload_field("Picture (instead of the text, or in addition)")
    first = context.explorer.first_search
    shown = _results(first, context.explorer.first_results, note="") if first.text else ""
    output = gr.HTML(shown, elem_id="search-results", min_height=40)
    fields = [text, image, database, where, k]

    async def search(progress: Progress, *values: Any) -> str:
        text, image, database, where, k = values
        picture = file_as_base64(image)
        request = SearchRequest(text=text or "", image=picture, database=database, where=where or "", k=k)
        neighbors = await context.explorer.search(request)
        return _results(request, neighbors, context.explorer.note(request.text))

    answer = page_event(context, search)
    for trigger in (button.click, text.submit, where.submit, image.upload):
        trigger(answer, fields, output, **EVENT_OPTIONS)
    return Tab("search", fields, answer, output, _values_of)


def _results(request: SearchRequest, neighbors: Sequence[NeighborView], note: str) -> str:
    query = f"“{request.text}”" if request.text.strip() else "the picture"
    heading = f"{len(neighbors)} neighbors of {query} ({views.database_title(request.database)})"
    return views.search_results(neighbors, heading, request.link(), note)


def _values_of(query: QueryParams) -> list[Any]:
    request = from_query(SearchRequest, query)
    return [request.text, None, request.database, request.where, request.k]
