"""The HTTP API in process, on real databases and a tiny model."""

import asyncio
import base64
import re
from argparse import Namespace
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from functools import partial
from http.client import HTTPConnection
from threading import Event

import gradio as gr
import httpx
import numpy as np
import pytest
from gradio import processing_utils
from gradio.data_classes import FileData
from PIL import Image

from jobs.cli.explore_config import ExploreConfig
from jobs.explore import explorer as explorer_module
from jobs.explore.__main__ import TOKEN_VARIABLE, make_app, token_of
from jobs.explore.api_models import SampleRequest, SearchRequest, encode_mix
from jobs.explore.examples import candidates, is_example, known_captions
from jobs.explore.explorer import SEARCHES_AT_ONCE, Explorer, Progress
from jobs.explore.guard import UploadQuota
from jobs.explore.png_cache import PngCache
from jobs.explore.tabs import views
from jobs.explore.tabs.views import verification
from jobs.explore.tabs.widgets import PageContext, file_as_base64, page_event, upload_field
from jobs.explore.visits import Visits
from jobs.explore.work_queue import BusyError, Turns, WorkQueue
from retrieval.errors import NodeError, UserError
from retrieval.index.hidden import HIDDEN_FOLDER, hide
from retrieval.provenance import SignedPicture, demo_credentials
from retrieval.storage.root import Root
from retrieval.updates import current
from retrieval.updates.delete import delete_from_database, delete_thumbnails
from tests.jobs.explore.explore_run import (
    DEFAULTS,
    encode_picture,
    green_id,
    hold_fourth_steps,
    open_app,
    open_explorer,
    serving,
    wait_until,
    write_root,
)
from tests.retrieval.provenance.hostile_pictures import png_of_too_many_pixels, png_with_a_text_bomb
from tests.trainer.tiny_run import DIM, pictures_of
from trainer.sampling.picture import read_recipe
from trainer.sampling.sampler import Sampler, TrainedModel

ADDRESS = "http://127.0.0.1"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Root, TrainedModel]:
    return write_root(tmp_path_factory.mktemp("explore"))


@pytest.fixture(scope="module")
def app(run):
    return open_app(run, max_upload_bytes=20_000, max_upload_pixels=10_000, max_condition_images=1, max_steps=900)


def with_client(app, requests: Callable[[httpx.AsyncClient], Awaitable[object]], base: str = ADDRESS):
    """The result of requests to the app in process."""

    async def run_requests():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url=base) as client:
            return await requests(client)

    return asyncio.run(run_requests())


def get(app, address: str, **options) -> httpx.Response:
    return with_client(app, lambda client: client.get(address, **options))


def post(app, address: str, body: dict[str, object], **options) -> httpx.Response:
    return with_client(app, lambda client: client.post(address, json=body, **options))


def base64_of(data: bytes) -> str:
    return base64.b64encode(data).decode()


def test_searching_with_a_picture_of_the_database_finds_that_picture_and_its_thumbnail(app):
    answer = post(
        app, "/search", {"image": base64_of(encode_picture(pictures_of("green")[5])), "database": "green", "k": 3}
    )
    first, *rest = answer.json()["neighbors"]
    assert (first["image_id"], first["caption"], len(rest)) == (str(green_id(5)), "caption of green-5", 2)
    assert first["similarity"] == pytest.approx(1, abs=1e-3)
    thumbnail = get(app, first["picture"])
    assert (thumbnail.headers["content-type"], Image.open(thumbnail).size) == ("image/jpeg", (32, 32))


def test_an_opted_out_picture_is_not_served(run):
    green = run[0].child("databases/green")
    hide(green, [green_id(5)])
    try:
        app = open_app(run)
    finally:
        green.delete(HIDDEN_FOLDER)
    assert get(app, f"picture/green/{green_id(5)}").status_code == 404
    assert get(app, f"picture/green/{green_id(6)}").status_code == 200


def test_a_running_page_leaves_out_images_that_are_hidden_or_deleted_later(tmp_path, monkeypatch):
    monkeypatch.setattr(current, "LOOK_EVERY_S", 0.0)
    run = write_root(tmp_path)
    green, app = run[0].child("databases/green"), open_app(run)
    query = {"image": base64_of(encode_picture(pictures_of("green")[5])), "database": "green", "k": 3}
    sample = {"images": [query["image"]], "mix": ["green"], "k": 3, "steps": 1}

    def ids_and_thumbnails() -> tuple[list[str], list[int]]:
        (first, *_), sampled = (
            post(app, *each).json()["neighbors"] for each in (("/search", query), ("/sample", sample))
        )
        statuses = [get(app, f"picture/green/{green_id(number)}").status_code for number in (5, 6, 7)]
        return [first["image_id"], sampled[0]["image_id"]], statuses

    last = get(app, f"picture/green/{green_id(20)}").content
    assert ids_and_thumbnails() == ([str(green_id(5))] * 2, [200, 200, 200])
    hide(green, [green_id(5)])
    ids, statuses = ids_and_thumbnails()
    assert (str(green_id(5)) in ids, statuses) == (False, [404, 200, 200])
    delete_from_database(green, [green_id(6)])
    ids, statuses = ids_and_thumbnails()
    assert (statuses, get(app, f"picture/green/{green_id(20)}").content) == ([404, 404, 200], last)
    assert [row["rows"] for row in get(app, "databases").json()["databases"] if row["name"] == "green"] == [23]


def test_thumbnails_of_tars_that_are_written_again_are_read_at_their_new_place(tmp_path):
    run = write_root(tmp_path)
    green, app = run[0].child("databases/green"), open_app(run)
    pictures = [get(app, f"picture/green/{green_id(number)}").content for number in (7, 8)]
    delete_thumbnails(green, np.array([green_id(0)]))
    assert get(app, f"picture/green/{green_id(7)}").content == pictures[0]
    assert get(app, f"picture/green/{green_id(0)}").status_code == 404
    tar = green.local_path("pictures/00000.tar")
    tar.rename(tar.with_name("00001.tar"))  # as an updated shard of `download`
    assert get(app, f"picture/green/{green_id(8)}").content == pictures[1]


def test_a_picture_of_a_deleted_tar_is_not_found(run):
    app = open_app(run)
    tar = run[0].local_path("databases/green/pictures/00000.tar")
    other = tar.rename(tar.with_suffix(".away"))
    try:
        answer = get(app, f"picture/green/{green_id(5)}")
    finally:
        other.rename(tar)
    assert (answer.status_code, answer.json()["detail"].split(",")[-1]) == (404, " or its file was deleted.")
    assert get(app, f"picture/green/{green_id(5)}").status_code == 200


def test_a_transparent_picture_has_the_same_neighbors_in_a_search_and_in_a_sample(app):
    picture = pictures_of("green")[5].convert("RGBA")
    picture.putalpha(Image.linear_gradient("L").resize(picture.size))
    file = base64_of(encode_picture(picture))
    search = post(app, "/search", {"image": file, "database": "green", "k": 4}).json()["neighbors"]
    sample = post(app, "/sample", {"images": [file], "mix": ["green"], "k": 4}).json()["neighbors"]
    assert [row["image_id"] for row in sample] == [row["image_id"] for row in search]
    similarities = [row["similarity"] for row in search]
    assert [row["similarity"] for row in sample] == pytest.approx(similarities, abs=1e-6)


def test_a_gradio_upload_that_is_a_url_is_not_downloaded(monkeypatch):
    async def download(*args, **options):
        raise AssertionError("downloaded")

    monkeypatch.setattr(processing_utils, "async_ssrf_protected_download", download)
    file = FileData(path="http://example.org/a.png").model_dump()
    image = upload_field("Picture")
    with pytest.raises(gr.Error, match="Upload the file itself"):
        asyncio.run(processing_utils.async_move_files_to_cache(file, image, check_in_upload_folder=True))


def test_a_text_search_equals_that_of_the_database_and_rows_without_pictures_have_none(app, run):
    answer = get(app, "/search", params={"text": "a circle", "database": "deep_red", "k": 5}).json()
    explorer = open_explorer(run)
    neighbors = explorer.databases["deep_red"].search(explorer.encoder.encode_texts(["a circle"]), 5)
    assert [row["image_id"] for row in answer["neighbors"]] == [str(image_id) for image_id in neighbors.ids[0]]
    assert {row["picture"] for row in answer["neighbors"]} == {""}
    assert get(app, f"picture/deep_red/{neighbors.ids[0][0]}").status_code == 404


def test_a_sample_has_its_neighbors_and_its_link_makes_the_same_picture(app):
    request = {"prompt": "a star", "mix": ["green:2", "deep_red"], "k": 2, "seed": 7}
    request |= {
        "images": [base64_of(encode_picture(pictures_of("sky_blue")[0]))],
        "exclude": [green_id(3)],
        "weights": [f"{green_id(4)}:0"],
    }
    answer = post(app, "/sample", request).json()
    png = base64.b64decode(answer["png"])
    assert [row["database"] for row in answer["neighbors"]] == ["green", "green", "deep_red", "deep_red"]
    assert read_recipe(png) == answer["recipe"]
    assert answer["recipe"]["seed"] == 7
    again = get(app, "/sample?" + answer["link"].partition("tab=make&")[2])
    assert Image.open(again).tobytes() == Image.open(httpx.Response(200, content=png)).tobytes()


def test_a_text_beyond_the_context_of_clip_has_a_note_in_the_api_and_on_the_page(app, run):
    long, read = "stag " * 20, "CLIP reads only the first 16 tokens"
    assert post(app, "/search", {"text": long}).json()["note"].startswith(read)
    assert post(app, "/search", {"text": "stag " * 14}).json()["note"] == ""
    request = {"prompt": long, "steps": 1, "mix": ["green"], "without": "caption == 'a'"}
    assert post(app, "/sample", request | {"without": ""}).json()["note"].startswith(read)
    assert post(app, "/attribution", request).json()["note"].startswith(read)
    assert read in views.search_results([], "0 neighbors", "?tab=search", open_explorer(run).note(long))


def test_a_picture_of_the_page_has_all_defaults_of_the_recipe(run):
    defaults = {"negative_prompt": "fog", "guidance_interval": (0.2, 0.8), "neighbor_weight": 0.5, "width": 48}
    config = DEFAULTS.model_copy(update=defaults)
    sampler = Sampler.open(*run, config)
    explorer = Explorer(run[0], ExploreConfig(), sampler.encoder, sampler, config)
    requests = [SampleRequest(prompt="a star", mix=["green"], guidance=guidance) for guidance in (None, 1.0)]
    guided, plain = [asyncio.run(explorer.sample([each]))[0].sample.request for each in requests]
    assert {name: getattr(guided, name) for name in defaults} == defaults
    assert (guided.guidance, plain.guidance, plain.negative_prompt, plain.neighbor_weight) == (2.0, 1.0, "", 0.5)


def test_a_link_names_the_default_database_and_keeps_all_digits_of_weights(app):
    assert "mix=index&" in post(app, "/sample", {"prompt": "a", "steps": 1}).json()["link"]
    assert "mix=" not in post(app, "/sample", {"prompt": "a", "steps": 1, "mode": "text"}).json()["link"]
    assert encode_mix(["green", "index", ""], [0.12345678, None, 1]) == ["green:0.12345678", "index:0"]


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({}, "type some words or choose a picture"),
        ({"text": "a", "database": "../index"}, "Databases: index, deep_red, green, sky_blue"),
        ({"text": "a", "k": 101}, "the limit of this server is 100"),
        ({"text": "a" * 1001}, "the limit of this server is 1,000"),
        ({"image": "no base64!"}, "base64 of a picture file"),
        ({"image": base64_of(b"GIF89a no picture")}, "cannot be used"),
        ({"image": base64_of(encode_picture(Image.new("RGB", (200, 200))))}, "more than 10000 pixels"),
        ({"image": "A" * 40_000}, "the limit of this server is 20,000"),
    ],
)
def test_an_invalid_search_is_rejected_with_a_reason(app, request_, message):
    answer = post(app, "/search", request_)
    assert answer.status_code == 400
    assert message in answer.json()["detail"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("search", '{"text": "a st\\udc80g"}'),
        ("search", '{"text": "a", "where": "caption == \'\\udc80\'"}'),
        ("sample", '{"prompt": "a st\\udc80g"}'),
        ("attribution", '{"prompt": "a st\\udc80g", "without": "caption == \'a\'"}'),
    ],
)
def test_a_text_with_a_lone_surrogate_is_rejected_with_a_reason(app, path, body):
    headers = {"content-type": "application/json"}
    answer = with_client(app, lambda client: client.post(path, content=body, headers=headers))
    assert answer.status_code == 400
    assert "a lone surrogate, which is no character" in answer.json()["detail"]


@pytest.mark.parametrize(
    ("request_", "status", "message"),
    [
        ({"prompt": "a", "steps": 901}, 400, "the limit of this server is 900"),
        ({"prompt": "a", "mix": ["green:x"]}, 400, "name:weight"),
        ({"prompt": "a", "mix": ["green", "nowhere"]}, 400, "no database 'nowhere'"),
        ({"prompt": "a", "mix": ["green:-1", "index"]}, 400, "weight"),
        ({"prompt": "a", "mix": ["green:-1"]}, 400, "'green:-1' has the weight -1"),
        ({"prompt": "a", "mix": ["green:nan"]}, 400, "'green:nan' has the weight nan"),
        ({"prompt": "a", "mix": ["green:0"]}, 400, "Wanted: above 0"),
        ({"prompt": "a", "mix": ["green:inf"]}, 400, "below 1e+06"),
        ({"prompt": "a", "vectors": ["AAAA"]}, 400, "image 'picture'"),
        ({"prompt": "a", "vectors": [base64_of(bytes(4 * DIM))]}, 400, "zero or not finite"),
        ({"prompt": "a", "weights": ["green:2"]}, 400, "id:factor"),
        ({"prompt": "a", "style": "green"}, 422, "Extra inputs"),
        ({"prompt": "a", "guidance": "nan"}, 422, "100"),
    ],
)
def test_an_invalid_sampling_request_is_rejected_with_a_reason(app, request_, status, message):
    answer = post(app, "/sample", request_)
    assert answer.status_code == status
    assert message in answer.text


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ('{"text": "a", "k": NaN}', "body.k: Input should be a finite number, got 'nan'."),
        ('{"text": "a", "k": "\\ud800"}', "got '\\ud800'."),
        ('{"text": "a", "\\ud800": 1}', "body: Input should be a valid string"),
        ('{"text": ["' + 9000 * "a" + '"]}', "body.text: Input should be a valid string"),
        ("text=a", "JSON decode error"),
    ],
)
def test_an_invalid_field_is_answered_with_a_short_text_whatever_its_value(app, body, message):
    headers = {"content-type": "application/json"}
    answer = with_client(app, lambda client: client.post("/search", content=body, headers=headers))
    assert answer.status_code == 422
    assert message in answer.json()["detail"]
    assert len(answer.content) < 300


def test_a_body_above_the_limit_is_rejected(app):
    async def chunks():
        for _ in range(1000):
            yield b" " * 10_000

    assert post(app, "/search", {"text": "a" * 1_200_000}).status_code == 413
    assert with_client(app, lambda client: client.post("/search", content=chunks())).status_code == 413


def test_a_server_with_a_token_rejects_requests_without_it(run):
    app = open_app(run, token="s3cret-ü")
    assert get(app, "/health").status_code == 200
    for address in ("/", "/databases", "/metrics", "/search?text=a", "/gradio_api/info"):
        assert get(app, address).status_code == 401
        assert get(app, address, headers={"Authorization": "Bearer other"}).status_code == 401
    assert get(app, "/databases", headers={"Authorization": "Bearer s3cret-ü".encode()}).status_code == 200
    assert get(app, "/", auth=("anybody", "s3cret-ü")).status_code == 200
    assert get(app, "/").headers["www-authenticate"].startswith("Basic")


def test_a_request_with_another_host_name_is_rejected(app):
    answer = with_client(app, lambda client: client.get("/databases"), base="http://rebound.example")
    assert answer.status_code == 400


@pytest.mark.parametrize(
    ("host", "token", "no_token", "allowed"),
    [
        ("127.0.0.1", "", False, True),
        ("::1", "", False, True),
        ("0.0.0.0", "", False, False),
        ("0.0.0.0", "t", False, True),
        ("gpu-01", "", False, False),
        ("0.0.0.0", "", True, True),
    ],
)
def test_other_machines_need_a_token(host, token, no_token, allowed, monkeypatch):
    monkeypatch.setenv(TOKEN_VARIABLE, token)
    arguments = Namespace(host=host, token_file=None, no_token=no_token)
    if allowed:
        assert token_of(arguments) == token
    else:
        with pytest.raises(UserError, match="--no-token"):
            token_of(arguments)


def test_an_empty_token_is_no_token(tmp_path, monkeypatch):
    file = tmp_path / "token"
    file.write_text(" \n")
    arguments = Namespace(host="127.0.0.1", token_file=file, no_token=False)
    with pytest.raises(UserError, match="is empty"):
        token_of(arguments)
    monkeypatch.setenv(TOKEN_VARIABLE, " \n")
    arguments.token_file, arguments.host = None, "0.0.0.0"
    with pytest.raises(UserError, match="--no-token"):
        token_of(arguments)


def test_a_hundred_concurrent_searches_are_answered_during_sampling(app):
    async def requests(client: httpx.AsyncClient):
        picture = asyncio.create_task(client.get("/sample", params={"prompt": "a", "steps": 30}))
        searches = [client.get("/search", params={"text": f"text {n}", "k": 3}) for n in range(100)]
        return [await picture, *await asyncio.gather(*searches)], await client.get("/metrics")

    answers, metrics = with_client(app, requests)
    assert {answer.status_code for answer in answers} == {200}
    assert 'explore_requests_total{route="/search",status="200"}' in metrics.text
    assert "explore_search_pending 0.0" in metrics.text


def test_sampling_stops_at_its_timeout_and_the_next_request_is_served(run):
    explorer = open_explorer(run, sample_timeout_s=3.0, max_steps=999)
    steps = hold_fourth_steps(explorer)
    app = make_app(explorer)

    async def requests(client: httpx.AsyncClient):
        slow = await client.get("/sample", params={"prompt": "a", "steps": 999})
        while "explore_picture_pending 0.0" not in (await client.get("/metrics")).text:
            await asyncio.sleep(0.01)
        explorer.samples.timeout_s = 300.0
        return slow, await client.get("/sample", params={"prompt": "a", "steps": 1})

    slow, quick = with_client(app, requests)
    assert (slow.status_code, quick.status_code) == (504, 200)
    assert "took more than 3 s" in slow.json()["detail"]
    assert max(steps) <= 4


def test_a_full_queue_and_a_timeout_raise_busy_errors_with_their_status():
    async def statuses() -> list[int]:
        queue = WorkQueue("picture", threads=1, max_pending=2, timeout_s=2.0)
        done = Event()

        async def status(work) -> int:
            try:
                return await queue.run(work)
            except BusyError as error:
                return error.status

        busy = asyncio.create_task(status(lambda stop: done.wait() and 200))
        await asyncio.sleep(0)
        rejected = await asyncio.gather(status(lambda stop: 200), status(lambda stop: 200), busy)
        done.set()
        queue.timeout_s = 300.0
        return [*rejected, await status(lambda stop: 200)]

    assert asyncio.run(statuses()) == [503, 429, 504, 200]


def test_searches_wait_for_their_turn_and_other_requests_do_not(run):
    explorer = open_explorer(run, max_searches=SEARCHES_AT_ONCE + 1)
    app = make_app(explorer)
    explorer.turns.timeout_s = 0.2

    async def requests(client: httpx.AsyncClient):
        search = partial(client.get, "/search", params={"text": "a"})
        async with AsyncExitStack() as turns:
            for _ in range(SEARCHES_AT_ONCE):
                await turns.enter_async_context(explorer.turns.take())
            late, full = await asyncio.gather(search(), search())
            others = [await client.get("/health"), await client.post("/search", json={"text": "a"})]
            metrics = await client.get("/metrics")
        explorer.turns.timeout_s = 300.0
        return late, full, await search(), others, metrics

    late, full, after, others, metrics = with_client(app, requests)
    assert (late.status_code, full.status_code, after.status_code) == (503, 429, 200)
    assert "could not start within 0.2 s" in late.json()["detail"]
    assert f"{SEARCHES_AT_ONCE + 1} search requests" in full.json()["detail"]
    assert late.headers["retry-after"] == full.headers["retry-after"] == "5"
    assert [answer.status_code for answer in others] == [200, 200]
    assert f"explore_search_turns {SEARCHES_AT_ONCE}.0" in metrics.text
    assert len(explorer.turns) == 0


def test_a_cancelled_request_gives_its_turn_back_also_while_it_waits():
    async def pending() -> list[int]:
        turns = Turns("search", running=1, max_pending=3, timeout_s=300.0)

        async def hold() -> None:
            async with turns.take():
                await asyncio.sleep(300)

        tasks = [asyncio.create_task(hold()) for _ in range(2)]
        await asyncio.sleep(0)
        before = len(turns)
        for task in reversed(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        async with turns.take():
            return [before, len(turns)]

    assert asyncio.run(pending()) == [2, 1]


def test_without_a_model_only_searches_are_possible(run):
    explorer = open_explorer(run)
    app = make_app(Explorer(run[0], explorer.limits, explorer.encoder, None, explorer.defaults))
    assert get(app, "/search?text=a").status_code == 200
    answer = get(app, "/sample?prompt=a")
    assert (answer.status_code, "make train" in answer.json()["detail"]) == (400, True)
    assert "Make a picture" not in get(app, "/").text


def test_the_page_loads_nothing_from_other_servers_and_the_api_has_an_openapi_description(app):
    page = get(app, "/")
    assert "default-src 'self'" in page.headers["content-security-policy"]
    assert set(get(app, "/openapi.json").json()["paths"]) >= {"/search", "/sample", "/databases", "/metrics"}
    assert get(app, "/databases").json()["databases"][2] == {
        "name": "green",
        "rows": 24,
        "encoder": "clip",
        "pictures": 24,
    }


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/sample?prompt=a&steps=1", {"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"}, 403),
        ("/sample?prompt=a&steps=1", {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}, 403),
        ("/sample?prompt=a&steps=1", {"sec-fetch-site": "same-site"}, 403),
        ("/search?text=a", {"origin": "https://elsewhere.example"}, 403),
        ("/search?text=a", {"origin": "null"}, 403),
        ("/search?text=a", {"referer": "https://elsewhere.example/page"}, 403),
        ("/search?text=a", {"sec-fetch-site": "same-origin", "referer": "http://127.0.0.1/"}, 200),
        ("/search?text=a", {"origin": "http://127.0.0.1"}, 200),
        ("/search?text=a", {"sec-fetch-site": "none", "sec-fetch-mode": "navigate"}, 200),
        ("/search?text=a", {}, 200),
        ("/", {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}, 200),
        ("/", {"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"}, 403),
    ],
)
def test_a_page_of_another_site_may_link_to_the_page_and_nothing_else(app, path, headers, status):
    assert get(app, path, headers=headers).status_code == status


def test_a_page_of_another_site_cannot_upload(app):
    answer = post_file(app, {"origin": "https://elsewhere.example"})
    assert answer.status_code == 403
    assert post_file(app, {}).status_code == 200


def test_uploads_of_an_hour_are_limited(run):
    app = open_app(run, max_uploads_bytes=1500)
    assert [post_file(app, {}).status_code for _ in range(2)] == [200, 429]
    quota = UploadQuota(100)
    assert [quota.take(60, 0.0), quota.take(60, 10.0), quota.take(40, 20.0)] == [True, False, True]
    assert [quota.take(60, 3599.0), quota.take(60, 3600.0)] == [False, True]


def post_file(app, headers):
    async def request(client: httpx.AsyncClient):
        files = {"files": ("a.png", b"x" * 1000)}
        return await client.post("/gradio_api/upload", files=files, headers=headers)

    return with_client(app, request)


def test_a_sample_is_cancelled_when_the_client_disconnects(run):
    explorer = open_explorer(run, max_steps=999)
    steps = hold_fourth_steps(explorer)
    with serving(make_app(explorer)) as url:
        connection = HTTPConnection(url.removeprefix("http://"))
        connection.request("GET", "/sample?prompt=a&steps=900")
        wait_until(lambda: len(steps) == 4)
        connection.close()
        wait_until(lambda: not len(explorer.samples))
    assert len(steps) == 4


def test_closing_the_server_stops_running_work():
    async def stopped() -> bool:
        queue = WorkQueue("picture", threads=1, max_pending=2, timeout_s=300.0)
        running = asyncio.create_task(queue.run(lambda stop: stop.wait(200)))
        while not len(queue):
            await asyncio.sleep(0.01)
        queue.close()
        return await running

    assert asyncio.run(stopped())


def test_an_object_store_that_does_not_respond_is_no_fault_of_the_request(run, monkeypatch):
    explorer = open_explorer(run)

    def fail(*_: object) -> None:
        raise NodeError("s3://bucket does not respond")

    monkeypatch.setattr(explorer, "_search", fail)
    answer = get(make_app(explorer), "/search?text=a")
    assert (answer.status_code, answer.json()["detail"]) == (503, "s3://bucket does not respond")


def test_an_attribution_has_both_pictures_and_the_neighbors_of_one_of_them_only(app):
    request = {"prompt": "a star", "mix": ["green"], "k": 3, "steps": 2, "seed": 7}
    complete = post(app, "/sample", request).json()
    best = complete["neighbors"][0]["image_id"]
    answer = post(app, "/attribution", request | {"without": f"image_id == {best}"}).json()
    assert answer["png"] == complete["png"]
    without = get(app, "/sample", params=request | {"without": f"image_id == {best}"})
    assert answer["png_without"] == base64_of(without.content) != answer["png"]
    assert [row["image_id"] for row in answer["removed"]] == [best]
    assert len(answer["added"]) == 1
    assert answer["clip_similarity"] < 1
    assert answer["pixel_difference"] > 0
    for without, message in (("", "invalid syntax"), ("size > 1", "The columns are"), ("k" * 1001, "1,000")):
        answer = post(app, "/attribution", request | {"without": without})
        assert (answer.status_code, message in answer.json()["detail"]) == (400, True)


def test_the_signed_statement_of_a_picture_is_checked(run, app):
    explorer = open_explorer(run)
    explorer.credentials = demo_credentials()
    answer = post(make_app(explorer), "/sample", {"prompt": "a star", "mix": ["green"], "k": 2, "steps": 1}).json()
    statement = post(app, "/verify", {"image": answer["png"]}).json()
    assert statement["is_valid"]
    assert [row["image_id"] for row in statement["neighbors"]] == [row["image_id"] for row in answer["neighbors"]]
    unsigned = post(app, "/verify", {"image": base64_of(encode_picture(pictures_of("green")[0]))})
    assert (unsigned.status_code, unsigned.json()["detail"]) == (404, "This picture has no signed statement.")
    for file in (b"no picture", png_of_too_many_pixels(), png_with_a_text_bomb()):
        assert post(app, "/verify", {"image": base64_of(file)}).status_code == 400
    html = verification(SignedPicture(False, False, ("<b>",), "<i>", "", {}, ({"caption": "<script>"},)))
    assert "Not valid" in html
    assert not {"<b>", "<i>", "<script>"} & set(re.findall("<[a-z]+>", html))


def test_a_page_shows_the_steps_of_a_picture_and_a_cancelled_one_says_so(run):
    explorer = open_explorer(run, max_steps=999)
    steps = hold_fourth_steps(explorer)
    context = PageContext(explorer, PngCache(), Visits())

    async def sample(progress: Progress, count: int) -> str:
        await explorer.sample([SampleRequest(prompt="a", steps=count)], progress)
        return f"{progress.done} of {progress.total}"

    async def shown(count: int) -> list[str]:
        results = []
        async for html in page_event(context, sample)(Namespace(session_hash="visit"), count):
            results.append(html)
            if count == 999:
                context.visits.end("visit")
        return results

    assert asyncio.run(shown(3))[-1] == "3 of 3"
    first, *_, last = asyncio.run(shown(999))
    assert re.search(r"Step \d+ of 999", first)
    assert "Cancelled." in last
    wait_until(lambda: not len(explorer.samples))
    # It is cancelled at the first sight of it, which may be before its first step.
    assert steps[3:] == [1, 2, 3, 4][: len(steps) - 3]


def test_a_page_says_that_an_uploaded_picture_has_expired(run, tmp_path):
    context = PageContext(open_explorer(run), PngCache(), Visits())
    path = tmp_path / "a.png"

    async def size(progress: Progress, path: str) -> str:
        return f"{len(file_as_base64(path))} characters"

    async def shown() -> str:
        return [html async for html in page_event(context, size)(Namespace(session_hash="visit"), str(path))][-1]

    path.write_bytes(b"abc")
    assert asyncio.run(shown()) == "4 characters"
    path.unlink()
    assert "has expired: it is kept for 60 minutes. Upload it again." in asyncio.run(shown())


def test_examples_are_captions_that_find_their_own_pictures(run):
    pictures = np.eye(4, dtype=np.float32)
    texts = np.array([[0.5, 0, 0, 0], [1, 0.5, 0, 0], [0, 0, 0.9, 0], [0, 0, 0, 0.2]], np.float32)
    assert known_captions(list("abcd"), texts, pictures) == ["c", "a", "d"]
    database = open_explorer(run).databases["green"].without([green_id(5)])
    captions, vectors = candidates(database)
    assert sorted(captions) == sorted(f"caption of green-{n}" for n in (*range(5), *range(6, 24)))
    rows = database.metadata_at(np.arange(len(database)))["caption"].to_pylist()
    np.testing.assert_array_equal(vectors[0], database.rows_at(np.array([rows.index(captions[0])]))[1][0])


def test_examples_are_searched_for_in_style_databases_before_the_training_database(run, monkeypatch):
    searched = []

    def recorded(databases, encoder):
        searched.extend(database.name for database in databases)
        return []

    monkeypatch.setattr(explorer_module, "example_captions", recorded)
    open_explorer(run)
    assert searched == ["deep_red", "green", "sky_blue", "index"]


def test_examples_are_short_texts_and_no_numbers_of_files():
    assert all(map(is_example, ("a star", "馬", "x" * 80)))
    assert not any(map(is_example, ("", "00227", "x" * 81)))


def test_the_page_opens_with_results_of_an_example_and_without_one_with_none(run):
    explorer = open_explorer(run)
    explorer.first_search = SearchRequest(text="a known text", database="green")
    explorer.first_results = asyncio.run(explorer.search(explorer.first_search))[:2]
    page = get(make_app(explorer), "/").text
    assert page.count("caption of green-") >= 2
    assert "a known text" in page
    explorer.first_search = SearchRequest(database="green")
    page = get(make_app(explorer), "/").text
    assert "search-results" in page
    assert "Link to this search" not in page
