"""The explore page: tabs that search, make, compare and check pictures. Nothing is loaded from other servers.

A link with a query (`?tab=make&prompt=...`) fills the form of a tab and runs it. What a visitor started is cancelled
when the visitor leaves.
"""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import gradio as gr
from fastapi import FastAPI
from pydantic import ValidationError

from jobs.explore.guard import UPLOAD_LIFETIME_S
from jobs.explore.tabs import compare, sample, search, verify, views
from jobs.explore.tabs.widgets import EVENT_OPTIONS, PageContext, Tab, error_text, visit_end
from retrieval.errors import UserError

FONTS = ["system-ui", "sans-serif"]
INTRODUCTION = """# Retrieval-augmented diffusion
The model conditions each picture on the nearest neighbors of the prompt in a database. Choose another
database, and the same model draws in another style."""


def mount(app: FastAPI, context: PageContext) -> None:
    """Serve the page at `/` of the application."""
    theme = gr.themes.Default(font=FONTS, font_mono=["ui-monospace", "monospace"])
    page = make_page(context).queue(default_concurrency_limit=None)
    gr.mount_gradio_app(
        app,
        page,
        path="/",
        theme=theme,
        css_paths=Path(__file__).with_name("page.css"),
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        max_file_size=context.explorer.limits.max_upload_bytes,
        show_error=False,
    )


def make_page(context: PageContext) -> gr.Blocks:
    """The page with all tabs; without a trained model, without those that sample."""
    with gr.Blocks(title="laion-rdm", analytics_enabled=False, delete_cache=(600, UPLOAD_LIFETIME_S)) as page:
        gr.Markdown(INTRODUCTION)
        tabs = []
        with gr.Tabs() as bar:
            with gr.Tab("Search", id="search"):
                tabs.append(search.add_tab(context))
            if context.explorer.sampler is not None:
                with gr.Tab("Make a picture", id="make"):
                    tabs.append(sample.add_tab(context))
                with gr.Tab("Compare styles", id="compare"):
                    tabs.append(compare.add_tab(context))
            with gr.Tab("Check a picture", id="verify"):
                tabs.append(verify.add_tab(context))
        _run_links(page, bar, tabs)
        page.unload(visit_end(context))
    return page


def _run_links(page: gr.Blocks, bar: gr.Tabs, tabs: list[Tab]) -> None:
    """When the page loads, fill and run the tab that the URL names."""
    outputs = [bar, *(component for tab in tabs for component in (*tab.fields, tab.output))]

    # One event fills the form and shows the result. A second event, chained to the first, could be lost:
    # the server closes the browser's event stream when no event is pending, and Gradio's client does not
    # reopen it for an event that is submitted at that moment.
    async def fill_and_run(request: gr.Request) -> AsyncIterator[list[Any]]:
        query = request.query_params
        tab = next((tab for tab in tabs if tab.name == query.get("tab", "")), None)
        if tab is None:
            yield [gr.skip()] * len(outputs)
            return

        def updates(values: list[Any], html: Any) -> list[Any]:
            place = outputs.index(tab.fields[0])
            before, after = place - 1, len(outputs) - place - len(values) - 1
            return [gr.Tabs(selected=tab.name), *[gr.skip()] * before, *values, html, *[gr.skip()] * after]

        unchanged = [gr.skip()] * len(tab.fields)
        try:
            values = tab.values_of(query)
        except (ValidationError, UserError) as error:
            yield updates(unchanged, views.error(f"This link cannot be used. {error_text(error)}"))
            return
        yield updates(values[: len(tab.fields)], gr.skip())
        async for html in tab.answer(request, *values):
            yield updates(unchanged, html)

    options = {**EVENT_OPTIONS, "scroll_to_output": False, "show_progress": "hidden"}
    page.load(fill_and_run, None, outputs, **options)
