"""The demo's web server, over real connections."""

import http.client
import io
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jobs.demo.server.routes import DRIP_S, HUGE_SIDE_PX, ROUTES, SLOW_S
from jobs.demo.server.server import REPOSITORY, WorldServer, open_port
from jobs.demo.world.bad_rows import FAILURE_KINDS, ROUTE_KINDS
from pipeline.recipe import DownloadConfig
from retrieval.errors import UserError

# a failure without a route: no server listens at these URLs
NOT_SERVED = {"refused"}
TIMEOUT_S = 120


def get(url: str) -> http.client.HTTPResponse:
    return urllib.request.urlopen(url, timeout=TIMEOUT_S)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    (folder / "images").mkdir()
    (folder / "world.json").write_text("{}")
    pixels = np.random.default_rng(0).integers(0, 255, (80, 100, 3), dtype=np.uint8)
    for name in ("a.jpg", "b.jpg", "c.jpg", "straße-é.jpg", "two words.jpg", "d.png", "e.webp", "f.gif"):
        Image.fromarray(pixels).save(folder / "images" / name)
    (folder / "images" / ".hidden.jpg").write_bytes(b"secret")
    (folder / "images" / "link.jpg").symlink_to(folder / "world.json")
    (folder / "images" / "deeper").mkdir()
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[WorldServer]:
    with WorldServer(folder, 0) as server:
        yield server


def status_of(url: str) -> int:
    with pytest.raises(urllib.error.HTTPError) as failure:
        get(url)
    with failure.value as response:
        return response.code


@pytest.mark.parametrize(
    ("name", "content_type"),
    [("a.jpg", "image/jpeg"), ("d.png", "image/png"), ("e.webp", "image/webp"), ("f.gif", "image/gif")],
)
def test_a_picture_has_its_bytes_and_its_content_type(
    server: WorldServer, folder: Path, name: str, content_type: str
) -> None:
    with get(f"{server.url}/images/{name}?v=7&w=a/b") as response:
        assert response.headers["Content-Type"] == content_type
        assert response.read() == (folder / "images" / name).read_bytes()


def test_quoted_names_with_spaces_and_accents_are_found(server: WorldServer, folder: Path) -> None:
    with get(f"{server.url}/images/stra%C3%9Fe-%C3%A9.jpg") as response:
        assert response.read() == (folder / "images" / "straße-é.jpg").read_bytes()
    with get(f"{server.url}/images/two%20words.jpg") as response:
        assert response.status == 200


def test_one_connection_carries_several_requests(server: WorldServer) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=TIMEOUT_S)
    statuses = []
    for path in ("/images/a.jpg", "/missing/a.jpg", "/html/a.jpg", "/empty/a.jpg", "/images/b.jpg"):
        connection.request("GET", path)
        response = connection.getresponse()
        response.read()
        statuses.append(response.status)
    connection.close()
    assert statuses == [200, 404, 200, 200, 200]


@pytest.mark.parametrize(
    "path",
    [
        "/images/../world.json",
        "/images/%2e%2e/world.json",
        "/images/%2e%2e%2fworld.json",
        "/images/..%5cworld.json",
        "/images//etc/hostname",
        "/images/%2fetc%2fhostname",
        "/images/a.jpg%00",
        f"/images/{300 * 'a'}.jpg",
        "/images/.hidden.jpg",
        "/images/link.jpg",
        "/images/deeper",
        "/images/",
        "/images",
        "/",
        "/world.json",
        "/redirect/1/../world.json",
        "/redirect/0/a.jpg",
        "/redirect/99/a.jpg",
        "/redirect/x/a.jpg",
        "/unknown/a.jpg",
        "/truncated/..%2fworld.json",
    ],
)
def test_only_pictures_can_be_read(server: WorldServer, path: str) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=TIMEOUT_S)
    connection.request("GET", path)
    assert connection.getresponse().status == 404
    connection.close()


@pytest.mark.parametrize(("route", "status"), [("missing", 404), ("forbidden", 403), ("gone", 410)])
def test_error_routes_have_their_status_though_the_picture_exists(server: WorldServer, route: str, status: int) -> None:
    assert status_of(f"{server.url}/{route}/a.jpg") == status


def first_failure(server: WorldServer, name: str) -> tuple[int, str | None]:
    with pytest.raises(urllib.error.HTTPError) as failure:
        get(f"{server.url}/flaky/{name}")
    with failure.value as response:
        return response.code, response.headers["Retry-After"]


def test_a_flaky_picture_fails_once_for_each_start_of_the_server(folder: Path) -> None:
    names = ("a.jpg", "b.jpg", "c.jpg", "d.png", "e.webp", "f.gif")
    failures = []
    for _ in range(2):
        with WorldServer(folder, 0) as server:
            failures.append([first_failure(server, name) for name in names])
            for name in names:
                with get(f"{server.url}/flaky/{name}") as response:
                    assert response.read() == (folder / "images" / name).read_bytes()
    assert failures[0] == failures[1]
    assert set(failures[0]) == {(500, None), (503, "0"), (503, "1")}


def test_redirects_lead_to_the_picture(server: WorldServer, folder: Path) -> None:
    with get(f"{server.url}/redirect/4/stra%C3%9Fe-%C3%A9.jpg?v=1") as response:
        assert response.url == f"{server.url}/images/stra%C3%9Fe-%C3%A9.jpg?v=1"
        assert response.read() == (folder / "images" / "straße-é.jpg").read_bytes()
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=TIMEOUT_S)
    connection.request("GET", "/redirect/4/a.jpg")
    assert connection.getresponse().headers["Location"] == "/redirect/3/a.jpg"
    connection.close()


def test_a_redirect_loop_never_ends(server: WorldServer) -> None:
    with pytest.raises(urllib.error.HTTPError, match="infinite loop") as failure:
        get(f"{server.url}/redirect-loop/a.jpg")
    failure.value.close()


def test_a_private_redirect_points_at_a_link_local_address(server: WorldServer) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=TIMEOUT_S)
    connection.request("GET", "/redirect-private/a.jpg")
    response = connection.getresponse()
    assert (response.status, response.headers["Location"][:23]) == (302, "http://169.254.169.254/")
    connection.close()


def test_a_slow_picture_is_late_and_complete(server: WorldServer, folder: Path) -> None:
    start = time.monotonic()
    with get(f"{server.url}/slow/a.jpg") as response:
        assert response.read() == (folder / "images" / "a.jpg").read_bytes()
    assert time.monotonic() - start >= SLOW_S


def test_a_dripping_body_never_exceeds_a_read_timeout(server: WorldServer) -> None:
    start = time.monotonic()
    with get(f"{server.url}/drip/a.jpg") as response:
        assert len([response.read(1) for _ in range(4)]) == 4
    assert time.monotonic() - start >= 3 * DRIP_S
    assert DownloadConfig.model_fields["timeout_s"].default / 3 > DRIP_S


def test_an_endless_body_has_no_length_and_goes_on(server: WorldServer) -> None:
    with get(f"{server.url}/endless/a.jpg") as response:
        assert response.headers["Content-Length"] is None
        assert all(len(response.read(1 << 20)) == 1 << 20 for _ in range(64))


def test_a_truncated_body_is_shorter_than_its_stated_length(server: WorldServer, folder: Path) -> None:
    size = (folder / "images" / "a.jpg").stat().st_size
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=TIMEOUT_S)
    connection.request("GET", "/truncated/a.jpg")
    with pytest.raises(http.client.IncompleteRead) as error:
        connection.getresponse().read()
    connection.close()
    assert (len(error.value.partial), error.value.expected) == (size // 2, size - size // 2)


def test_a_cut_jpeg_has_its_stated_length_and_does_not_decode(server: WorldServer) -> None:
    with get(f"{server.url}/cut-jpeg/a.jpg") as response:
        image = Image.open(io.BytesIO(response.read()))
    with pytest.raises(OSError, match="truncated"):
        image.load()


def test_a_huge_picture_is_a_small_valid_file(server: WorldServer, monkeypatch: pytest.MonkeyPatch) -> None:
    with get(f"{server.url}/huge/a.jpg") as response:
        data = response.read()
    assert len(data) < 200_000
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    image = Image.open(io.BytesIO(data))
    assert image.size == (HUGE_SIDE_PX, HUGE_SIDE_PX)
    packed = data[data.index(b"IDAT") + 4 : data.index(b"IEND") - 8]
    assert len(zlib.decompress(packed)) == HUGE_SIDE_PX * (HUGE_SIDE_PX // 8 + 1)


def test_html_and_empty_bodies_have_status_200(server: WorldServer) -> None:
    with get(f"{server.url}/html/a.jpg") as response:
        assert response.headers["Content-Type"].startswith("text/html")
        assert response.read().startswith(b"<!DOCTYPE html>")
    with get(f"{server.url}/empty/a.jpg") as response:
        assert response.read() == b""


def test_an_opted_out_picture_has_the_header(server: WorldServer) -> None:
    with get(f"{server.url}/noai/a.jpg") as response:
        assert response.headers["X-Robots-Tag"] == "noai"
        assert Image.open(response).size == (100, 80)


def test_hanging_clients_do_not_delay_others(server: WorldServer) -> None:
    hanging = [get(f"{server.url}/drip/{i}.jpg") for i in range(20)]
    with ThreadPoolExecutor(32) as pool:
        sizes = list(pool.map(lambda i: len(get(f"{server.url}/images/a.jpg?{i}").read()), range(300)))
    assert len(set(sizes)) == 1
    for response in hanging:
        response.close()


def test_every_route_in_the_metadata_exists() -> None:
    used = {kind.name.split(":")[1] for kind in (*FAILURE_KINDS, *ROUTE_KINDS)}
    assert used - NOT_SERVED == set(ROUTES) - {"images"}


def test_the_error_for_a_taken_port_names_the_setting(folder: Path) -> None:
    with open_port(0) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(UserError, match=rf"127\.0\.0\.1:{port}.*world\.port"), WorldServer(folder, port):
            pass


def test_a_folder_without_a_finished_world_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"world\.json"), WorldServer(tmp_path, 0):
        pass


def test_the_port_is_free_again_after_the_block(folder: Path) -> None:
    with WorldServer(folder, 0) as server:
        get(f"{server.url}/images/a.jpg").close()
    open_port(server.port).close()


def test_the_server_ends_when_its_parent_is_killed(folder: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from jobs.demo.server.server import WorldServer\n"
        "with WorldServer(Path(sys.argv[1]), 0) as server:\n"
        "    print(server.port, flush=True); time.sleep(600)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script, str(folder)], cwd=REPOSITORY, stdout=subprocess.PIPE)
    assert parent.stdout is not None
    port = int(parent.stdout.readline())
    get(f"http://127.0.0.1:{port}/images/a.jpg").close()
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return
        time.sleep(0.1)
    pytest.fail("the server still listens long after its parent was killed")
