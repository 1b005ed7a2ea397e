"""The comparison tab: one prompt and one seed with neighbors of several databases, side by side."""

from typing import Any

import gradio as gr
from starlette.datastructures import QueryParams

from jobs.explore.api_models import SampleRequest, from_query
from jobs.explore.explorer import Progress
from jobs.explore.tabs import views
from jobs.explore.tabs.sample import NUMBERS, number_fields, number_values, sample_view
from jobs.explore.tabs.widgets import EVENT_OPTIONS, PageContext, Tab, add_cancel_button, add_examples, page_event
from retrieval.errors import UserError


def add_tab(context: PageContext) -> Tab:
    """Add the form and its events to the page."""
    limits = context.explorer.limits
    with gr.Row():
        with gr.Column(min_width=280):
            prompt = gr.Textbox(label="Prompt", max_length=limits.max_text_characters)
            first_styles = context.explorer.styles[: limits.max_styles]
            styles = gr.CheckboxGroup(context.choices, value=first_styles, label="Styles")
            button = gr.Button("Compare", variant="primary")
            add_cancel_button(context)
            add_examples(context, prompt)
        with gr.Column(min_width=280):
            numbers = number_fields(context)
    output = gr.HTML(elem_id="comparison", min_height=40)
    fields = [prompt, styles, *numbers]

    async def compare(progress: Progress, prompt: str, names: list[str], *numbers: Any) -> str:
        if not names:
            raise UserError("Choose at least one style.")
        settings = dict(zip(NUMBERS, numbers, strict=True))
        request = SampleRequest(prompt=prompt or "", mix=names, **settings)
        request.check(limits)
        requests = [request.model_copy(update={"mix": [name]}) for name in names]
        pictures = await context.explorer.sample(requests, progress)
        shown = [sample_view(context, *pair) for pair in zip(requests, pictures, strict=True)]
        heading = f"“{request.prompt}” in {len(names)} styles"
        return views.comparison(shown, heading, request.link(tab="compare"))

    answer = page_event(context, compare)
    for trigger in (button.click, prompt.submit):
        trigger(answer, fields, output, **EVENT_OPTIONS)
    return Tab("compare", fields, answer, output, lambda query: _values_of(query, context))


def _values_of(query: QueryParams, context: PageContext) -> list[Any]:
    request = from_query(SampleRequest, query)
    return [request.prompt, [name for name, _ in request.databases()], *number_values(context, request)]
