"""The page in a real browser: typed into, clicked, and looked at; nothing is fetched from elsewhere."""

import base64
import re
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from urllib.parse import quote

import numpy as np
import pytest
import uvicorn
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.jobs.explore.explore_run import file_of, open_app, write_root
from tests.trainer.tiny_run import DIM, pictures_of

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
WAIT_MS = 30_000

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on PATH: install one to test the page")


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A running server."""
    app = open_app(write_root(tmp_path_factory.mktemp("page")), max_upload_pixels=10_000)
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    while not server.started and thread.is_alive():
        time.sleep(0.05)
    yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    server.should_exit = True
    thread.join()


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
    """The page as it opens; what it asked for is checked when the test ends."""
    opened = browser.new_page(viewport={"width": 1280, "height": 900})
    opened.set_default_timeout(WAIT_MS)
    asked: list[str] = []
    opened.on("request", lambda request: asked.append(request.url))
    opened.goto(address)
    yield opened
    opened.close()
    foreign = [url for url in asked if not url.startswith((address, "data:", "blob:"))]
    assert asked
    assert not foreign


def follow(page: Page, link: str, shown: str) -> None:
    """Open a link that makes pictures, once more if none comes: an answer was seen to be lost on the way."""
    page.goto(link)
    try:
        expect(page.locator(shown).first).to_be_visible()
    except AssertionError:
        page.reload()


def is_seen(page: Page, picture: str) -> bool:
    """True if the browser could draw the picture."""
    page.wait_for_function("(what) => document.querySelector(what)?.complete", arg=picture)
    return page.evaluate("(what) => document.querySelector(what).naturalWidth > 0", picture)


def test_words_and_a_dropped_picture_find_neighbors_and_a_bad_one_is_explained(page):
    page.get_by_role("textbox", name="Words").fill("a circle <b>")
    page.get_by_role("textbox", name="Words").press("Enter")
    expect(page.locator("#found h2")).to_contain_text("12 neighbors of “a circle <b>” (deep red)")
    expect(page.locator("#found .missing")).to_have_count(12)
    page.get_by_role("combobox", name="Database").click()
    page.get_by_role("option", name="green").click()
    page.get_by_role("button", name="Search", exact=True).click()
    expect(page.locator("#found img")).to_have_count(12)
    assert is_seen(page, "#found img")
    expect(page.locator("#found li").first).to_contain_text("license unknown")
    page.get_by_role("textbox", name="Words").fill("")
    drop = page.locator("input[type=file]").first
    drop.set_input_files(
        {"name": "a.png", "mimeType": "image/png", "buffer": file_of(pictures_of("green")[7])}
    )
    expect(page.locator("#found li").first).to_contain_text("caption of green-7")
    page.get_by_role("button", name="Clear").or_(page.get_by_label("Remove Image")).first.click()
    large = file_of(pictures_of("green")[7].resize((200, 200)))
    drop.set_input_files({"name": "b.png", "mimeType": "image/png", "buffer": large})
    expect(page.get_by_role("alert")).to_contain_text("more than 10000 pixels")


def test_the_keyboard_makes_a_picture_with_its_neighbors_and_its_link_makes_it_again(page, address):
    page.get_by_role("tab", name="Make a picture").press("Enter")
    page.get_by_role("spinbutton", name="Seed").fill("5")
    page.get_by_role("textbox", name="What the picture shows").focus()
    page.keyboard.type("a star")
    page.keyboard.press("Tab")
    expect(page.get_by_role("combobox", name="Style 1")).to_be_focused()
    page.get_by_role("button", name="Make the picture").press("Enter")
    expect(page.locator("#drawn h2")).to_have_text("deep red")
    assert is_seen(page, "#drawn .made > img")
    expect(page.locator("#drawn .neighbors li")).to_have_count(4)
    expect(page.locator("#drawn .made")).to_contain_text("seed 5")
    made = page.locator("#drawn .made > img").get_attribute("src")
    follow(page, address + page.locator("#drawn a.again").get_attribute("href"), "#drawn .made")
    expect(page.locator("#drawn .made > img")).to_have_attribute("src", made)
    expect(page.get_by_role("textbox", name="What the picture shows")).to_have_value("a star")
    page.goto(f"{address}/?tab=make&prompt=a&steps=none")
    expect(page.get_by_role("alert")).to_contain_text("This link cannot be used. steps")


def test_the_form_takes_all_that_a_link_may_say_and_forgets_its_vectors_with_the_first_run(page, address):
    vector = quote(base64.b64encode(np.ones(DIM, "<f4").tobytes()))
    link = f"{address}/?tab=make&prompt=a&mix=index&k=70&guidance=40.25&steps=2&vectors={vector}"
    follow(page, link, "#drawn .made")
    expect(page.locator("#drawn .made")).to_contain_text("70 neighbors, guidance 40.25, 2 steps")
    again = page.locator("#drawn a.again")
    expect(again).to_have_attribute("href", re.compile("mix=index&.*vectors="))
    page.get_by_role("textbox", name="What the picture shows").fill("b")
    page.get_by_role("button", name="Make the picture").click()
    expect(again).to_have_attribute("href", re.compile("prompt=b&((?!vectors).)*$"))


def test_styles_stand_side_by_side_also_on_a_phone(page, address):
    page.set_viewport_size({"width": 390, "height": 800})
    follow(page, f"{address}/?tab=compare&prompt=a+star&mix=green&mix=sky_blue&steps=2", "#compared .made")
    expect(page.locator("#compared .made")).to_have_count(2)
    assert is_seen(page, "#compared .made > img")
    width, scroll = page.evaluate("[innerWidth, document.documentElement.scrollWidth]")
    assert scroll <= width == 390
