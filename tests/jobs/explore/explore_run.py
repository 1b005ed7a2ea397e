"""The tiny run of the trainer's tests, with the pictures of one of its databases in a tar."""

import io
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI
from PIL import Image

from jobs.cli.explore_config import ExploreConfig
from jobs.explore.__main__ import make_app
from jobs.explore.explorer import Explorer
from pipeline.pictures.tars import tar_writer
from retrieval.storage import schema
from retrieval.storage.root import Root
from retrieval.storage.schema import sample_key
from tests.trainer.tiny_run import pictures_of, write_run
from trainer.sampling.recipe import SampleConfig
from trainer.sampling.sampler import Sampler, TrainedModel

DEFAULTS = SampleConfig(k=4, steps=3, guidance=2.0, device="cpu")


def write_root(folder: Path) -> tuple[Root, TrainedModel]:
    """The tiny run; the database `green` has its pictures in a tar."""
    root, trained = write_run(folder)
    path = root.local_path("databases/green/pictures/00000.tar")
    path.parent.mkdir()
    with tar_writer(path) as tar:
        for number, picture in enumerate(pictures_of("green")):
            tar.add(sample_key(green_id(number)), encode_picture(picture, "JPEG"), "", {})
    return root, trained


def green_id(number: int) -> int:
    """The image id of a picture of the database `green`."""
    return schema.image_id(f"databases/green/green-{number}")


def encode_picture(picture: Image.Image, kind: str = "PNG") -> bytes:
    """A picture as the bytes of a file."""
    buffer = io.BytesIO()
    picture.save(buffer, kind)
    return buffer.getvalue()


def open_explorer(run: tuple[Root, TrainedModel], **limits: float) -> Explorer:
    """An explorer of the run. limits: fields of ExploreConfig; by default, a busy machine keeps those of time."""
    sampler = Sampler.open(*run, DEFAULTS)
    config = ExploreConfig(**({"search_timeout_s": 300.0} | limits))
    return Explorer(run[0], config, sampler.encoder, sampler, DEFAULTS)


def open_app(run: tuple[Root, TrainedModel], token: str = "", **limits: float) -> FastAPI:
    """Page and API of the run. limits: fields of ExploreConfig."""
    return make_app(open_explorer(run, **limits), token=token)


@contextmanager
def serving(app: Any, root_path: str = "") -> Iterator[str]:
    """The address of a running server of an ASGI application."""
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", root_path=root_path))
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    while not server.started and thread.is_alive():
        time.sleep(0.05)
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def hold_fourth_steps(explorer: Explorer) -> list[int]:
    """Let the fourth denoising step of each request take until the request ends.

    Returns a list that holds, for every step begun, its number in its request.
    """
    cancellable, steps = explorer.sampler.unet, []
    unet = cancellable.unet

    def held_unet(*args: Any, **options: Any) -> Any:
        steps.append(cancellable.progress.done)
        if steps[-1] == 4:
            cancellable.stop.wait(300)
        return unet(*args, **options)

    cancellable.unet = held_unet
    return steps


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait until a condition holds, at most 300 s."""
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("this took more than 300 s")
