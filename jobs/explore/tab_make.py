"""The tab that makes a picture of a prompt, styles with weights and settings, and shows what made it."""

from typing import Any

import gradio as gr
from starlette.datastructures import QueryParams

from jobs.explore import views
from jobs.explore.api_models import SampleAsk, encoded_mix, from_query
from jobs.explore.explorer import Painted, Shown
from jobs.explore.widgets import EVENT, Desk, Tab, encoded, told, upload
from retrieval.errors import UserError
from trainer.sampling.request import MAX_SEED

Components = list[gr.components.Component]
NUMBERS = ("k", "guidance", "steps", "seed")
SCHEDULERS = [("DDIM", "ddim"), ("PLMS", "plms"), ("DPM-Solver++", "dpm++")]
STYLES = 3
"""Databases that the form mixes; the API takes more."""
MODES = [
    ("the words and their neighbors", "text_and_neighbors"),
    ("the neighbors alone", "neighbors"),
    ("the words alone", "text"),
    ("nothing: a random picture of the training database's kind", "unconditional"),
]


def add(desk: Desk) -> Tab:
    """Lay the tab out."""
    limits = desk.explorer.limits
    with gr.Row():
        with gr.Column(min_width=280):
            prompt = gr.Textbox(label="What the picture shows", max_length=limits.max_text)
            styles, weights = _mix(desk)
            button = gr.Button("Make the picture", variant="primary")
        with gr.Column(min_width=280):
            settings = numbers(desk)
            with gr.Accordion("More", open=False):
                mode = gr.Radio(MODES, value=MODES[0][1], label="What the model is told")
                image = upload("Picture to begin from")
                near = gr.Textbox(label="Neighbors to leave out (their ids) or to weigh (id:0.5)")
                scheduler = gr.Dropdown(SCHEDULERS, value=desk.explorer.form.scheduler, label="Sampler")
                top_m = gr.Slider(0.01, 1, 1, step=0.01, label="Random pictures: share of the most retrieved")
    shown = gr.HTML(elem_id="drawn", min_height=40)
    fields = [prompt, *styles, *weights, *settings, mode, image, near, scheduler, top_m]

    async def made(prompt: str, *rest: Any) -> str:
        """The form's values, and where a link filled it the vectors of its pictures."""
        names, weighted, rest = rest[:STYLES], rest[STYLES : 2 * STYLES], rest[2 * STYLES :]
        numbers, (mode, image, near, scheduler, top_m, *vectors) = rest[: len(NUMBERS)], rest[len(NUMBERS) :]
        ids = (near or "").replace(",", " ").split()
        ask = SampleAsk.model_validate(
            {
                "prompt": prompt or "",
                "mix": encoded_mix(names, weighted),
                **dict(zip(NUMBERS, numbers, strict=True)),
                **{"mode": mode, "scheduler": scheduler, "top_m": top_m},
                "exclude": [one for one in ids if ":" not in one],
                "weights": [one for one in ids if ":" in one],
                "images": [encoded(image)] if image else [],
                "vectors": vectors[0] if vectors else [],
            }
        )
        (sample,) = await desk.explorer.sample([ask])
        return views.drawn(drawn(desk, ask, sample))

    answer = told(made)
    for trigger in (button.click, prompt.submit):
        trigger(answer, fields, shown, **EVENT)
    # only the run that a link starts has its vectors: the form does not show them
    return Tab("make", [*fields, gr.State([])], answer, shown, lambda query: _values(query, desk))


def numbers(desk: Desk) -> Components:
    """The settings of a picture: k, guidance, steps, seed."""
    limits, form = desk.explorer.limits, desk.explorer.form
    return [
        gr.Slider(1, limits.max_k, min(form.k, limits.max_k), step=1, label="Neighbors"),
        gr.Slider(0, 100, form.guidance, step=0.5, label="Guidance (1 is none)"),
        gr.Slider(1, limits.max_steps, min(form.steps, limits.max_steps), step=1, label="Steps"),
        gr.Number(form.seed, label="Seed", precision=0, minimum=0, maximum=MAX_SEED),
    ]


def drawn(desk: Desk, ask: SampleAsk, painted: Painted) -> views.Drawn:
    """A finished picture as the page shows it."""
    sample, request = painted.sample, painted.sample.request
    near: list[Shown] = desk.explorer.neighbors(sample)
    names = " and ".join(dict.fromkeys(views.words(one.database) for one in near))
    facts = (
        f"{sample.picture.width} × {sample.picture.height} pixels, {len(near)} neighbors, "
        f"guidance {request.guidance:g}, {request.steps} steps, seed {request.seed}"
    )
    return views.Drawn(
        title=names or "no neighbors",
        prompt=request.prompt,
        width=sample.picture.width,
        place=desk.made.keep(painted.png),
        link=ask.link(sample),
        facts=facts,
        neighbors=near,
    )


def _mix(desk: Desk) -> tuple[Components, Components]:
    """Dropdowns of styles and their weights; all but the first are folded away."""
    styles: Components = []
    weights: Components = []
    for number in range(1, STYLES + 1):
        with gr.Row() if number == 1 else gr.Accordion(f"Mix in style {number}", open=False), gr.Row():
            choices = desk.choices if number == 1 else [("none", ""), *desk.choices]
            value = desk.first if number == 1 else ""
            styles.append(gr.Dropdown(choices, value=value, label=f"Style {number}", filterable=False))
            weights.append(gr.Number(1, label=f"Weight {number}", minimum=0, step=0.5))
    return styles, weights


def _values(query: QueryParams, desk: Desk) -> list[Any]:
    ask, form = from_query(SampleAsk, query), desk.explorer.form
    if len(ask.mix) > STYLES:
        raise UserError(f"This form mixes {STYLES} styles at most. Ask /sample for more.")
    pairs = [*(ask.weighted() or [(desk.first, 1.0)]), *[("", 1.0)] * STYLES][:STYLES]
    guidance = form.guidance if ask.guidance is None else ask.guidance
    return [
        ask.prompt,
        *(name for name, _ in pairs),
        *(weight for _, weight in pairs),
        *(ask.k or form.k, guidance, ask.steps or form.steps, ask.seed),
        *(ask.mode, None, " ".join([*map(str, ask.exclude), *ask.weights])),
        *(ask.scheduler or form.scheduler, ask.top_m, ask.vectors),
    ]
