"""The sampling tab: a prompt, styles and settings as the form, a picture with its neighbors as the result."""

from typing import Any

import gradio as gr
from starlette.datastructures import QueryParams

from jobs.explore.api_models import SampleRequest, encode_mix, from_query
from jobs.explore.explorer import AttributedPicture, Progress, SampledPicture
from jobs.explore.tabs import views
from jobs.explore.tabs.widgets import (
    EVENT_OPTIONS,
    PageContext,
    Tab,
    add_cancel_button,
    add_examples,
    file_as_base64,
    page_event,
    upload_field,
)
from retrieval.errors import UserError
from retrieval.index.conditions import EXAMPLE
from trainer.sampling.request import MAX_SEED

Components = list[gr.components.Component]
NUMBERS = ("k", "guidance", "steps", "seed")
SCHEDULERS = [
    ("DDIM", "ddim"),
    ("PLMS", "plms"),
    ("DPM-Solver++", "dpm++"),
    ("Euler", "euler"),
    ("Euler, Karras", "euler_karras"),
    ("UniPC", "unipc"),
]
STYLES = 3
"""Databases that the form mixes; the API takes more."""
MODES = [
    ("text and neighbors", "text_and_neighbors"),
    ("neighbors only", "neighbors"),
    ("text only", "text"),
    ("unconditional: a random picture like those of the training database", "unconditional"),
]


def add_tab(context: PageContext) -> Tab:
    """Add the form and its events to the page."""
    limits = context.explorer.limits
    with gr.Row():
        with gr.Column(min_width=280):
            prompt = gr.Textbox(label="Prompt", max_length=limits.max_text_characters)
            styles, weights = _mix_fields(context)
            button = gr.Button("Make the picture", variant="primary")
            add_cancel_button(context)
            add_examples(context, prompt)
        with gr.Column(min_width=280):
            numbers = number_fields(context)
            with gr.Accordion("More settings", open=False):
                mode = gr.Radio(MODES, value=MODES[0][1], label="Condition the model on")
                image = upload_field("Picture as a condition")
                ids = gr.Textbox(label="Neighbors to exclude (id) or to weigh (id:0.5)")
                without = gr.Textbox(label="Compare with the picture without rows where", placeholder=EXAMPLE)
                scheduler = gr.Dropdown(SCHEDULERS, value=context.explorer.defaults.scheduler, label="Sampler")
                top_m = gr.Slider(0.01, 1, 1, step=0.01, label="Unconditional: share of the most retrieved")
    output = gr.HTML(elem_id="sample", min_height=40)
    fields = [prompt, *styles, *weights, *numbers, mode, image, ids, without, scheduler, top_m]

    async def sample(progress: Progress, *values: Any) -> str:
        request = _request_of(values)
        if request.without:
            pair = await context.explorer.attribute(request, progress)
            return views.attribution(attribution_view(context, request, pair))
        (picture,) = await context.explorer.sample([request], progress)
        return views.sample(sample_view(context, request, picture))

    answer = page_event(context, sample)
    for trigger in (button.click, prompt.submit):
        trigger(answer, fields, output, **EVENT_OPTIONS)
    return Tab("make", fields, answer, output, lambda query: _values_of(query, context))


def number_fields(context: PageContext) -> Components:
    """The numeric settings of a sample, in the order of NUMBERS."""
    limits, defaults = context.explorer.limits, context.explorer.defaults
    return [
        gr.Slider(1, limits.max_k, min(defaults.k, limits.max_k), step=1, label="Neighbors"),
        gr.Slider(0, 100, defaults.guidance, step=0.5, label="Guidance (1: no guidance)"),
        gr.Slider(1, limits.max_steps, min(defaults.steps, limits.max_steps), step=1, label="Steps"),
        gr.Number(defaults.seed, label="Seed", precision=0, minimum=0, maximum=MAX_SEED),
    ]


def number_values(context: PageContext, request: SampleRequest) -> list[Any]:
    defaults = context.explorer.defaults
    guidance = defaults.guidance if request.guidance is None else request.guidance
    return [request.k or defaults.k, guidance, request.steps or defaults.steps, request.seed]


def sample_view(context: PageContext, request: SampleRequest, picture: SampledPicture) -> views.SampleView:
    """A finished sample as the page shows it."""
    sample, settings = picture.sample, picture.sample.request
    neighbors = context.explorer.neighbors(sample)
    databases = dict.fromkeys(views.database_title(neighbor.database) for neighbor in neighbors)
    facts = (
        f"{sample.picture.width} × {sample.picture.height} pixels, {len(neighbors)} neighbors, "
        f"guidance {settings.guidance:g}, {settings.steps} steps, seed {settings.seed}"
    )
    return views.SampleView(
        title=" and ".join(databases) or "no neighbors",
        prompt=settings.prompt,
        width=sample.picture.width,
        png_url=context.cache.add(picture.png),
        link=request.link(sample),
        facts=facts,
        note=context.explorer.note(settings.prompt),
        neighbors=neighbors,
    )


def attribution_view(context: PageContext, request: SampleRequest, pair: AttributedPicture) -> views.AttributionView:
    """A picture with and without a group of neighbors as the page shows them."""
    result, views_of = pair.attribution, context.explorer.views
    complete = request.model_copy(update={"without": ""})
    return views.AttributionView(
        condition=request.without,
        complete=sample_view(context, complete, pair.with_group),
        without=sample_view(context, request, pair.without_group),
        clip_similarity=result.clip_similarity,
        pixel_difference=result.pixel_difference,
        removed=views_of(result.removed),
        added=views_of(result.added),
    )


def _mix_fields(context: PageContext) -> tuple[Components, Components]:
    """Dropdowns of styles and their weights; all but the first are in closed accordions."""
    styles: Components = []
    weights: Components = []
    for number in range(1, STYLES + 1):
        with gr.Row() if number == 1 else gr.Accordion(f"Add style {number}", open=False), gr.Row():
            choices = context.choices if number == 1 else [("none", ""), *context.choices]
            value = context.first_database if number == 1 else ""
            styles.append(gr.Dropdown(choices, value=value, label=f"Style {number}", filterable=False))
            weights.append(gr.Number(1, label=f"Weight {number}", minimum=0, step=0.5))
    return styles, weights


def _request_of(values: tuple[Any, ...]) -> SampleRequest:
    """The request in the values of the form, or in those of a link, which may end with a list of vectors."""
    styles, weights = values[1 : 1 + STYLES], values[1 + STYLES : 1 + 2 * STYLES]
    k, guidance, steps, seed, mode, image, ids, without, scheduler, top_m, *vectors = values[1 + 2 * STYLES :]
    entries = (ids or "").replace(",", " ").split()
    return SampleRequest.model_validate(
        {
            "prompt": values[0] or "",
            "mix": encode_mix(styles, weights),
            **{"k": k, "guidance": guidance, "steps": steps, "seed": seed},
            **{"mode": mode, "scheduler": scheduler, "top_m": top_m},
            "exclude": [entry for entry in entries if ":" not in entry],
            "weights": [entry for entry in entries if ":" in entry],
            "without": (without or "").strip(),
            "images": [file_as_base64(image)] if image else [],
            "vectors": vectors[0] if vectors else [],
        }
    )


def _values_of(query: QueryParams, context: PageContext) -> list[Any]:
    """The inverse of `_request_of`, for the query of a link."""
    request = from_query(SampleRequest, query)
    if len(request.mix) > STYLES:
        raise UserError(f"This form mixes at most {STYLES} styles. Use /sample to mix more.")
    mix = [*(request.databases() or [(context.first_database, 1.0)]), *[("", 1.0)] * STYLES][:STYLES]
    ids = " ".join([*map(str, request.exclude), *request.weights])
    return [
        request.prompt,
        *(name for name, _ in mix),
        *(weight for _, weight in mix),
        *number_values(context, request),
        *(request.mode, None, ids, request.without),
        *(request.scheduler or context.explorer.defaults.scheduler, request.top_m, request.vectors),
    ]
