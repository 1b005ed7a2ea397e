"""The page: tabs that search, make a picture and compare styles, over the same explorer as the API.

Gradio draws the forms with files that it brings along; fonts are the system's, and nothing is told to
anybody. An address with a question in it (`/?tab=make&prompt=...`) fills the form and runs it.
"""

from typing import Any

import gradio as gr
from fastapi import FastAPI
from pydantic import ValidationError

from jobs.explore import tab_compare, tab_make, tab_search, views
from jobs.explore.widgets import EVENT, Desk, Tab, mistake
from retrieval.errors import UserError

FORGET_S = 3600
"""Seconds after which an upload is removed."""
FONTS = ["system-ui", "sans-serif"]
INTRODUCTION = """# Paint with what is found
The model paints while it looks at the nearest pictures of a database. Swap the database, and the same model
paints in another style."""


def mount(app: FastAPI, desk: Desk) -> None:
    """Serve the page from the application's root."""
    theme = gr.themes.Default(font=FONTS, font_mono=["ui-monospace", "monospace"])
    page = make_page(desk).queue(default_concurrency_limit=None)
    gr.mount_gradio_app(
        app,
        page,
        path="/",
        theme=theme,
        css_paths=views.FOLDER / "page.css",
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        max_file_size=desk.explorer.limits.max_upload_bytes,
        show_error=False,
    )


def make_page(desk: Desk) -> gr.Blocks:
    """All tabs in one page; without a trained model the first alone."""
    with gr.Blocks(title="laion-rdm", analytics_enabled=False, delete_cache=(600, FORGET_S)) as page:
        gr.Markdown(INTRODUCTION)
        tabs = []
        with gr.Tabs() as bar:
            with gr.Tab("Search", id="search"):
                tabs.append(tab_search.add(desk))
            if desk.explorer.sampler is not None:
                with gr.Tab("Make a picture", id="make"):
                    tabs.append(tab_make.add(desk))
                with gr.Tab("Compare styles", id="compare"):
                    tabs.append(tab_compare.add(desk))
        _answer_addresses(page, bar, tabs)
    return page


def _answer_addresses(page: gr.Blocks, bar: gr.Tabs, tabs: list[Tab]) -> None:
    """Fill and run the tab that the address names."""
    asked = gr.State("")
    fields = [field for tab in tabs for field in (*tab.fields, tab.shown)]

    def fill(request: gr.Request) -> list[Any]:
        query = request.query_params
        name = query.get("tab", "")
        values: list[Any] = []
        for tab in tabs:
            if tab.name != name:
                values += [gr.skip()] * (len(tab.fields) + 1)
                continue
            try:
                values += [*tab.values(query), gr.skip()]
            except (ValidationError, UserError) as error:
                text = mistake(error) if isinstance(error, ValidationError) else str(error)
                values += [*[gr.skip()] * len(tab.fields), views.problem(f"This link cannot be used. {text}")]
                name = ""
        there = query.get("tab", "") in [tab.name for tab in tabs]
        return [name, gr.Tabs(selected=query["tab"]) if there else gr.skip(), *values]

    filled = page.load(fill, None, [asked, bar, *fields], api_visibility="private", show_progress="hidden")
    for tab in tabs:
        filled.then(
            _if_asked(tab),
            [asked, *tab.fields],
            tab.shown,
            **{**EVENT, "scroll_to_output": False},
        )


def _if_asked(tab: Tab) -> Any:
    async def answer(asked: str, *values: Any) -> Any:
        return await tab.answer(*values) if asked == tab.name else gr.skip()

    return answer
