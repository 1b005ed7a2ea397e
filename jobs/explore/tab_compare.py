"""The tab that compares: one prompt and one seed through several databases, side by side."""

from typing import Any

import gradio as gr
from starlette.datastructures import QueryParams

from jobs.explore import views
from jobs.explore.api_models import SampleAsk, from_query
from jobs.explore.tab_make import drawn, numbers
from jobs.explore.widgets import EVENT, Desk, Tab, told
from retrieval.errors import UserError


def add(desk: Desk) -> Tab:
    """Lay the tab out."""
    limits = desk.explorer.limits
    styles = desk.explorer.styles[: limits.max_styles]
    with gr.Row():
        with gr.Column(min_width=280):
            prompt = gr.Textbox(label="What the pictures show", max_length=limits.max_text)
            chosen = gr.CheckboxGroup(desk.choices, value=styles, label="Styles")
            button = gr.Button("Compare", variant="primary")
        with gr.Column(min_width=280):
            settings = numbers(desk)
    shown = gr.HTML(elem_id="compared", min_height=40)
    fields = [prompt, chosen, *settings]

    async def compared(prompt: str, names: list[str], *rest: Any) -> str:
        k, guidance, steps, seed = rest
        if not names:
            raise UserError("Choose a style at least.")
        whole = SampleAsk(prompt=prompt or "", mix=names, k=k, guidance=guidance, steps=steps, seed=seed)
        whole.check(limits)
        asks = [whole.model_copy(update={"mix": [name]}) for name in names]
        samples = await desk.explorer.sample(asks)
        pictures = [drawn(desk, ask, sample) for ask, sample in zip(asks, samples, strict=True)]
        return views.compared(pictures, f"“{whole.prompt}” in {len(names)} styles", whole.link(tab="compare"))

    answer = told(compared)
    for trigger in (button.click, prompt.submit):
        trigger(answer, fields, shown, **EVENT)
    return Tab("compare", fields, answer, shown, lambda query: _values(query, desk))


def _values(query: QueryParams, desk: Desk) -> list[Any]:
    ask, form = from_query(SampleAsk, query), desk.explorer.form
    guidance = form.guidance if ask.guidance is None else ask.guidance
    names = [name for name, _ in ask.weighted()]
    return [ask.prompt, names, ask.k or form.k, guidance, ask.steps or form.steps, ask.seed]
