"""The API beside the page, in process, on real databases and a tiny model."""

import asyncio
import base64
import time
from argparse import Namespace
from collections.abc import Awaitable, Callable
from threading import Event

import gradio as gr
import httpx
import pytest
from gradio import processing_utils
from gradio.data_classes import FileData
from PIL import Image

from jobs.explore.__main__ import TOKEN, make_app, token_of
from jobs.explore.api_models import encoded_mix
from jobs.explore.explorer import Explorer
from jobs.explore.widgets import upload
from jobs.explore.work_queue import Refused, Turns
from retrieval.errors import UserError
from retrieval.index.hidden import FILE as BLOCKED
from retrieval.index.hidden import block
from retrieval.storage.root import Root
from tests.jobs.explore.explore_run import file_of, green_id, open_app, open_explorer, write_root
from tests.trainer.tiny_run import DIM, pictures_of
from trainer.sampling.picture import read_recipe
from trainer.sampling.sampler import Trained

HERE = "http://127.0.0.1"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Root, Trained]:
    return write_root(tmp_path_factory.mktemp("explore"))


@pytest.fixture(scope="module")
def app(run):
    return open_app(run, max_upload_bytes=20_000, max_upload_pixels=10_000, max_images=1, max_steps=900)


def asked(app, talk: Callable[[httpx.AsyncClient], Awaitable[object]], base: str = HERE):
    """What a conversation with the app returns."""

    async def hold():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url=base) as client:
            return await talk(client)

    return asyncio.run(hold())


def get(app, address: str, **options) -> httpx.Response:
    return asked(app, lambda client: client.get(address, **options))


def post(app, address: str, body: dict[str, object], **options) -> httpx.Response:
    return asked(app, lambda client: client.post(address, json=body, **options))


def base64_of(data: bytes) -> str:
    return base64.b64encode(data).decode()


def test_a_picture_finds_itself_and_is_shown_small(app):
    answer = post(
        app, "/search", {"image": base64_of(file_of(pictures_of("green")[5])), "database": "green", "k": 3}
    )
    first, *rest = answer.json()["neighbors"]
    assert (first["image_id"], first["caption"], len(rest)) == (str(green_id(5)), "caption of green-5", 2)
    assert first["similarity"] == pytest.approx(1, abs=1e-3)
    shown = get(app, first["picture"])
    assert (shown.headers["content-type"], Image.open(shown).size) == ("image/jpeg", (32, 32))


def test_an_opted_out_picture_is_not_served(run):
    green = run[0].child("databases/green")
    block(green, [green_id(5)])
    try:
        app = open_app(run)
    finally:
        green.delete(BLOCKED)
    assert get(app, f"/picture/green/{green_id(5)}").status_code == 404
    assert get(app, f"/picture/green/{green_id(6)}").status_code == 200


def test_a_transparent_picture_is_the_same_for_a_search_and_for_a_picture(app):
    picture = pictures_of("green")[5].convert("RGBA")
    picture.putalpha(Image.linear_gradient("L").resize(picture.size))
    file = base64_of(file_of(picture))
    found = post(app, "/search", {"image": file, "database": "green", "k": 4}).json()["neighbors"]
    made = post(app, "/sample", {"images": [file], "mix": ["green"], "k": 4}).json()["neighbors"]
    assert [one["image_id"] for one in made] == [one["image_id"] for one in found]
    similar = [[one["similarity"] for one in list_] for list_ in (made, found)]
    assert similar[0] == pytest.approx(similar[1], abs=1e-6)


def test_a_gradio_upload_that_names_an_address_is_not_fetched(monkeypatch):
    async def fetched(*args, **options):
        raise AssertionError("fetched")

    monkeypatch.setattr(processing_utils, "async_ssrf_protected_download", fetched)
    file = FileData(path="http://example.org/a.png").model_dump()
    image = upload("Picture")
    with pytest.raises(gr.Error, match="Upload the file itself"):
        asyncio.run(processing_utils.async_move_files_to_cache(file, image, check_in_upload_folder=True))


def test_words_find_what_the_database_finds_and_say_where_no_picture_is_at_hand(app, run):
    answer = get(app, "/search", params={"text": "a circle", "database": "deep_red", "k": 5}).json()
    explorer = open_explorer(run)
    found = explorer.databases["deep_red"].search(explorer.encoder.encode_texts(["a circle"]), 5)
    assert [one["image_id"] for one in answer["neighbors"]] == [str(one) for one in found.ids[0]]
    assert {one["picture"] for one in answer["neighbors"]} == {""}
    assert get(app, f"/picture/deep_red/{found.ids[0][0]}").status_code == 404


def test_a_picture_comes_with_its_neighbors_and_its_link_makes_it_again(app):
    ask = {"prompt": "a star", "mix": ["green:2", "deep_red"], "k": 2, "seed": 7}
    ask |= {
        "images": [base64_of(file_of(pictures_of("sky_blue")[0]))],
        "exclude": [green_id(3)],
        "weights": [f"{green_id(4)}:0"],
    }
    answer = post(app, "/sample", ask).json()
    png = base64.b64decode(answer["png"])
    assert [one["database"] for one in answer["neighbors"]] == ["green", "green", "deep_red", "deep_red"]
    assert read_recipe(png) == answer["recipe"]
    assert answer["recipe"]["seed"] == 7
    again = get(app, "/sample?" + answer["link"].partition("tab=make&")[2])
    assert Image.open(again).tobytes() == Image.open(httpx.Response(200, content=png)).tobytes()


def test_a_link_names_the_database_that_an_empty_mix_means_and_weights_to_the_last_digit(app):
    assert "mix=index&" in post(app, "/sample", {"prompt": "a", "steps": 1}).json()["link"]
    assert "mix=" not in post(app, "/sample", {"prompt": "a", "steps": 1, "mode": "text"}).json()["link"]
    assert encoded_mix(["green", "index", ""], [0.12345678, None, 1]) == ["green:0.12345678", "index:0"]


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        ({}, "type some words or give a picture"),
        ({"text": "a", "database": "../index"}, "There are: index, deep_red, green, sky_blue"),
        ({"text": "a", "k": 101}, "100 is the most here"),
        ({"text": "a" * 1001}, "1,000 is the most here"),
        ({"image": "no base64!"}, "base64 of a picture file"),
        ({"image": base64_of(b"GIF89a no picture")}, "cannot be used"),
        ({"image": base64_of(file_of(Image.new("RGB", (200, 200))))}, "more than 10000 pixels"),
        ({"image": "A" * 40_000}, "20,000 is the most here"),
    ],
)
def test_a_search_that_cannot_be_is_refused_with_a_reason(app, ask, words):
    answer = post(app, "/search", ask)
    assert answer.status_code == 400
    assert words in answer.json()["detail"]


@pytest.mark.parametrize(
    ("ask", "status", "words"),
    [
        ({"prompt": "a", "steps": 901}, 400, "900 is the most here"),
        ({"prompt": "a", "mix": ["green:x"]}, 400, "name:weight"),
        ({"prompt": "a", "mix": ["green", "nowhere"]}, 400, "no database 'nowhere'"),
        ({"prompt": "a", "mix": ["green:-1", "index"]}, 400, "weight"),
        ({"prompt": "a", "vectors": ["AAAA"]}, 400, "image 'picture'"),
        ({"prompt": "a", "vectors": [base64_of(bytes(4 * DIM))]}, 400, "zero or not finite"),
        ({"prompt": "a", "weights": ["green:2"]}, 400, "id:factor"),
        ({"prompt": "a", "style": "green"}, 422, "Extra inputs"),
        ({"prompt": "a", "guidance": "nan"}, 422, "100"),
    ],
)
def test_a_picture_that_cannot_be_made_is_refused_with_a_reason(app, ask, status, words):
    answer = post(app, "/sample", ask)
    assert answer.status_code == status
    assert words in answer.text


def test_a_body_is_read_no_further_than_its_limit(app):
    async def chunks():
        for _ in range(1000):
            yield b" " * 10_000

    assert post(app, "/search", {"text": "a" * 1_200_000}).status_code == 413
    assert asked(app, lambda client: client.post("/search", content=chunks())).status_code == 413


def test_a_server_with_a_token_is_closed_to_all_others(run):
    app = open_app(run, token="s3cret-ü")
    assert get(app, "/health").status_code == 200
    for address in ("/", "/databases", "/metrics", "/search?text=a", "/gradio_api/info"):
        assert get(app, address).status_code == 401
        assert get(app, address, headers={"Authorization": "Bearer other"}).status_code == 401
    assert get(app, "/databases", headers={"Authorization": "Bearer s3cret-ü".encode()}).status_code == 200
    asks_for_it = get(app, "/", auth=("anybody", "s3cret-ü"))
    assert asks_for_it.status_code == 200
    assert get(app, "/").headers["www-authenticate"].startswith("Basic")


def test_a_page_elsewhere_reaches_nothing_by_a_name_of_its_own(app):
    assert (
        asked(app, lambda client: client.get("/databases"), base="http://rebound.example").status_code == 400
    )


@pytest.mark.parametrize(
    ("host", "token", "open_to_all", "allowed"),
    [
        ("127.0.0.1", "", False, True),
        ("::1", "", False, True),
        ("0.0.0.0", "", False, False),
        ("0.0.0.0", "t", False, True),
        ("gpu-01", "", False, False),
        ("0.0.0.0", "", True, True),
    ],
)
def test_other_machines_need_a_token(host, token, open_to_all, allowed, monkeypatch):
    monkeypatch.setenv(TOKEN, token)
    arguments = Namespace(host=host, token_file=None, no_token=open_to_all)
    if allowed:
        assert token_of(arguments) == token
    else:
        with pytest.raises(UserError, match="--no-token"):
            token_of(arguments)


def test_an_empty_token_opens_nothing(tmp_path, monkeypatch):
    file = tmp_path / "token"
    file.write_text(" \n")
    arguments = Namespace(host="127.0.0.1", token_file=file, no_token=False)
    with pytest.raises(UserError, match="is empty"):
        token_of(arguments)
    monkeypatch.setenv(TOKEN, " \n")
    arguments.token_file, arguments.host = None, "0.0.0.0"
    with pytest.raises(UserError, match="--no-token"):
        token_of(arguments)


def test_a_hundred_searches_at_once_are_answered_while_a_picture_is_made(app):
    async def crowd(client: httpx.AsyncClient):
        picture = asyncio.create_task(client.get("/sample", params={"prompt": "a", "steps": 30}))
        searches = [client.get("/search", params={"text": f"text {n}", "k": 3}) for n in range(100)]
        return [await picture, *await asyncio.gather(*searches)], await client.get("/metrics")

    answers, metrics = asked(app, crowd)
    assert {answer.status_code for answer in answers} == {200}
    assert 'explore_requests_total{route="/search",status="200"}' in metrics.text
    assert "explore_search_pending 0.0" in metrics.text


def test_a_picture_that_takes_too_long_is_given_up_and_the_next_one_is_made(run):
    app = open_app(run, sample_timeout_s=1.0, max_steps=999)

    async def talk(client: httpx.AsyncClient):
        slow = await client.get("/sample", params={"prompt": "a", "steps": 999})
        while "explore_picture_pending 0.0" not in (await client.get("/metrics")).text:
            await asyncio.sleep(0.01)
        return slow, await client.get("/sample", params={"prompt": "a", "steps": 1})

    began = time.monotonic()
    slow, quick = asked(app, talk)
    assert (slow.status_code, quick.status_code) == (504, 200)
    assert "took more than 1 s" in slow.json()["detail"]
    assert time.monotonic() - began < 10


def test_who_comes_to_a_full_queue_is_sent_away_and_who_waits_too_long_is_told():
    async def crowd() -> list[int]:
        turns = Turns("picture", threads=1, most=2, timeout_s=0.2)
        done = Event()

        async def status(work) -> int:
            try:
                return await turns.run(work)
            except Refused as refused:
                return refused.status

        busy = asyncio.create_task(status(lambda stop: done.wait() and 200))
        await asyncio.sleep(0)
        found = await asyncio.gather(status(lambda stop: 200), status(lambda stop: 200), busy)
        done.set()
        return [*found, await status(lambda stop: 200)]

    assert asyncio.run(crowd()) == [503, 429, 504, 200]


def test_without_a_model_there_are_searches_alone(run):
    opened = open_explorer(run)
    app = make_app(Explorer(run[0], opened.limits, opened.encoder, None, opened.form))
    assert get(app, "/search?text=a").status_code == 200
    refused = get(app, "/sample?prompt=a")
    assert (refused.status_code, "make train" in refused.json()["detail"]) == (400, True)
    assert "Make a picture" not in get(app, "/").text


def test_the_page_may_load_nothing_from_elsewhere_and_the_api_describes_itself(app):
    page = get(app, "/")
    assert "default-src 'self'" in page.headers["content-security-policy"]
    assert set(get(app, "/openapi.json").json()["paths"]) >= {"/search", "/sample", "/databases", "/metrics"}
    assert get(app, "/databases").json()["databases"][2] == {
        "name": "green",
        "rows": 24,
        "encoder": "clip",
        "pictures": 24,
    }
