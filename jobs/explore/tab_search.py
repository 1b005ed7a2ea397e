"""The tab that searches: words or a picture in, neighbors of one database out."""

from typing import Any

import gradio as gr
from starlette.datastructures import QueryParams

from jobs.explore import views
from jobs.explore.api_models import SearchAsk, from_query
from jobs.explore.widgets import EVENT, Desk, Tab, encoded, told, upload


def add(desk: Desk) -> Tab:
    """Lay the tab out."""
    limits = desk.explorer.limits
    with gr.Row():
        with gr.Column(scale=3, min_width=260):
            text = gr.Textbox(label="Words", placeholder="a stag in the snow", max_length=limits.max_text)
            database = gr.Dropdown(desk.choices, value=desk.first, label="Database", filterable=False)
            k = gr.Slider(1, limits.max_k, min(12, limits.max_k), step=1, label="Neighbors")
            button = gr.Button("Search", variant="primary")
        with gr.Column(scale=2, min_width=220):
            image = upload("Picture (instead of words, or with them)")
    shown = gr.HTML(elem_id="found", min_height=40)
    fields = [text, image, database, k]

    async def searched(text: str, image: str | None, database: str, k: int) -> str:
        ask = SearchAsk(text=text or "", image=encoded(image), database=database, k=k)
        found = await desk.explorer.search(ask)
        what = f"“{ask.text}”" if ask.text.strip() else "the picture"
        heading = f"{len(found)} neighbors of {what} ({views.words(database)})"
        return views.found(found, heading, ask.link())

    answer = told(searched)
    for trigger in (button.click, text.submit, image.upload):
        trigger(answer, fields, shown, **EVENT)
    return Tab("search", fields, answer, shown, lambda query: _values(query, desk))


def _values(query: QueryParams, desk: Desk) -> list[Any]:
    ask = from_query(SearchAsk, query)
    return [ask.text, None, ask.database, ask.k]
