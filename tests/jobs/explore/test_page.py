"""The page in a real browser: forms, links and layout; it loads nothing from other servers."""

import base64
import re
import shutil
from collections.abc import Iterator
from urllib.parse import quote

import httpx
import numpy as np
import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import Route

from jobs.explore.__main__ import make_app
from tests.jobs.explore.explore_run import (
    encode_picture,
    hold_fourth_steps,
    open_app,
    open_explorer,
    serving,
    wait_until,
    write_root,
)
from tests.trainer.tiny_run import DIM, pictures_of

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
WAIT_MS = 120_000

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on PATH: install it to test the page")


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A running server."""
    app = open_app(write_root(tmp_path_factory.mktemp("page")), max_upload_pixels=10_000)
    with serving(app) as url:
        yield url


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    expect.set_options(timeout=WAIT_MS)
    with sync_playwright() as playwright:
        switches = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=switches)
        yield opened
        opened.close()


@pytest.fixture
def page(browser: Browser, address: str) -> Iterator[Page]:
    """The opened page. After the test, all its requests must have gone to its own server."""
    opened = browser.new_page(viewport={"width": 1280, "height": 900})
    opened.set_default_timeout(WAIT_MS)
    urls: list[str] = []
    opened.on("request", lambda request: urls.append(request.url))
    opened.goto(address)
    yield opened
    opened.close()
    foreign = [url for url in urls if not url.startswith((address, "data:", "blob:"))]
    assert urls
    assert not foreign


def is_drawn(page: Page, selector: str) -> bool:
    """True if the browser could draw the picture."""
    page.wait_for_function("(selector) => document.querySelector(selector)?.complete", arg=selector)
    return page.evaluate("(selector) => document.querySelector(selector).naturalWidth > 0", selector)


def test_a_text_and_an_uploaded_picture_find_neighbors_and_a_large_picture_is_rejected(page):
    page.get_by_role("textbox", name="Text").fill("a circle <b>")
    page.get_by_role("textbox", name="Text").press("Enter")
    expect(page.locator("#search-results h2")).to_contain_text("12 neighbors of “a circle <b>” (deep red)")
    expect(page.locator("#search-results .no-picture")).to_have_count(12)
    page.get_by_role("combobox", name="Database").click()
    page.get_by_role("option", name="green").click()
    page.get_by_role("button", name="Search", exact=True).click()
    expect(page.locator("#search-results img")).to_have_count(12)
    assert is_drawn(page, "#search-results img")
    expect(page.locator("#search-results li").first).to_contain_text("license unknown")
    page.get_by_role("textbox", name="Text").fill("")
    upload = page.locator("input[type=file]").first
    upload.set_input_files(
        {"name": "a.png", "mimeType": "image/png", "buffer": encode_picture(pictures_of("green")[7])}
    )
    expect(page.locator("#search-results li").first).to_contain_text("caption of green-7")
    page.get_by_role("button", name="Clear").or_(page.get_by_label("Remove Image")).first.click()
    large = encode_picture(pictures_of("green")[7].resize((200, 200)))
    upload.set_input_files({"name": "b.png", "mimeType": "image/png", "buffer": large})
    expect(page.get_by_role("alert")).to_contain_text("more than 10000 pixels")


def test_the_keyboard_alone_makes_a_picture_and_its_link_makes_the_same_picture(page, address):
    page.get_by_role("tab", name="Make a picture").press("Enter")
    page.get_by_role("spinbutton", name="Seed").fill("5")
    page.get_by_role("textbox", name="Prompt").focus()
    page.keyboard.type("a star")
    page.keyboard.press("Tab")
    expect(page.get_by_role("combobox", name="Style 1")).to_be_focused()
    page.get_by_role("button", name="Make the picture").press("Enter")
    expect(page.locator("#sample h2")).to_have_text("deep red")
    assert is_drawn(page, "#sample .sample > img")
    expect(page.locator("#sample .neighbors li")).to_have_count(4)
    expect(page.locator("#sample .sample")).to_contain_text("seed 5")
    png_path = page.locator("#sample .sample > img").get_attribute("src")
    page.goto(f"{address}/" + page.locator("#sample a.permalink").get_attribute("href"))
    expect(page.locator("#sample .sample > img")).to_have_attribute("src", png_path)
    expect(page.get_by_role("textbox", name="Prompt")).to_have_value("a star")
    page.goto(f"{address}/?tab=make&prompt=a&steps=none")
    expect(page.get_by_role("alert")).to_contain_text("This link cannot be used. steps")


def test_a_link_sets_every_field_and_its_vectors_condition_the_first_run_only(page, address):
    vector = quote(base64.b64encode(np.ones(DIM, "<f4").tobytes()))
    link = f"{address}/?tab=make&prompt=a&mix=index&k=70&guidance=40.25&steps=2&vectors={vector}"
    page.goto(link)
    expect(page.locator("#sample .sample")).to_contain_text("70 neighbors, guidance 40.25, 2 steps")
    permalink = page.locator("#sample a.permalink")
    expect(permalink).to_have_attribute("href", re.compile("mix=index&.*vectors="))
    page.get_by_role("textbox", name="Prompt").fill("b")
    page.get_by_role("button", name="Make the picture").click()
    expect(permalink).to_have_attribute("href", re.compile("prompt=b&((?!vectors).)*$"))


def test_a_picture_without_a_group_is_compared_and_a_picture_without_a_signature_says_so(page, address):
    page.goto(f"{address}/?tab=make&prompt=a+star&mix=green&k=2&steps=2&without='green'+in+caption")
    expect(page.locator("#sample .sample")).to_have_count(2)
    assert is_drawn(page, "#sample li:last-child .sample > img")
    expect(page.locator("#sample")).to_contain_text("2 neighbors only in the picture with them")
    expect(page.locator("#sample .neighbors li")).to_have_count(2)
    page.get_by_role("tab", name="Check a picture").click()
    picture = {"name": "a.png", "mimeType": "image/png", "buffer": encode_picture(pictures_of("green")[7])}
    page.locator("input[type=file]").last.set_input_files(picture)
    expect(page.locator("#verification h2")).to_have_text("No signed statement")


def test_the_comparison_fits_on_a_phone(page, address):
    page.set_viewport_size({"width": 390, "height": 800})
    page.goto(f"{address}/?tab=compare&prompt=a+star&mix=green&mix=sky_blue&steps=2")
    expect(page.locator("#comparison .sample")).to_have_count(2)
    assert is_drawn(page, "#comparison .sample > img")
    width, scroll = page.evaluate("[innerWidth, document.documentElement.scrollWidth]")
    assert scroll <= width == 390


def test_a_picture_shows_its_steps_and_is_cancelled_by_a_button_or_when_the_visitor_leaves(browser, tmp_path):
    explorer = open_explorer(write_root(tmp_path), max_steps=999)
    steps = hold_fourth_steps(explorer)
    with serving(make_app(explorer)) as url:
        page = browser.new_page()
        page.goto(f"{url}/?tab=make&prompt=a&steps=900")
        expect(page.get_by_role("progressbar", name="denoising steps")).to_be_visible()
        page.get_by_role("button", name="Cancel").first.click()
        expect(page.locator("#sample")).to_have_text("Cancelled.")
        wait_until(lambda: not len(explorer.samples))
        cancelled = len(steps)
        page.get_by_role("button", name="Make the picture").click()
        wait_until(lambda: len(steps) == cancelled + 4)
        page.close()
        wait_until(lambda: not len(explorer.samples))
    assert cancelled <= 4
    assert len(steps) == cancelled + 4


def test_the_page_works_below_the_path_of_a_proxy(browser, tmp_path):
    app = open_app(write_root(tmp_path))
    with serving(app, "/rdm") as server, serving(proxy(server, "/rdm")) as url:
        page = browser.new_page()
        page.goto(f"{url}/rdm/?tab=search&text=a+circle&database=green")
        expect(page.locator("#search-results img").first).to_be_visible(timeout=WAIT_MS)
        assert is_drawn(page, "#search-results img")
        page.locator("a.permalink").first.click()
        expect(page.locator("#search-results img").first).to_be_visible(timeout=WAIT_MS)
        assert page.url.startswith(f"{url}/rdm/?")
        page.close()


def proxy(server: str, prefix: str) -> Starlette:
    """A reverse proxy that serves another server below a path, and passes on responses as they arrive."""
    client = httpx.AsyncClient(base_url=server, timeout=60)

    async def forward(request: Request) -> StreamingResponse:
        path = request.url.path.removeprefix(prefix)
        sent = client.build_request(
            request.method, f"{path}?{request.url.query}", headers=request.headers.raw, content=await request.body()
        )
        response = await client.send(sent, stream=True)
        return StreamingResponse(response.aiter_raw(), response.status_code, dict(response.headers))

    return Starlette(routes=[Route(f"{prefix}/{{path:path}}", forward, methods=["GET", "POST"])])
