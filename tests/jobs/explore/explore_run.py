"""A root that can be explored: the tiny run of the trainer's tests, with pictures beside one database."""

import io
from pathlib import Path

from fastapi import FastAPI
from PIL import Image

from jobs.explore.__main__ import make_app
from jobs.explore.config import ExploreConfig
from jobs.explore.explorer import Explorer
from pipeline.download.tars import key_of, writing
from retrieval.storage import schema
from retrieval.storage.root import Root
from tests.trainer.tiny_run import pictures_of, write_run
from trainer.sampling.recipe import SampleConfig
from trainer.sampling.sampler import Sampler, Trained

FORM = SampleConfig(k=4, steps=3, guidance=2.0, device="cpu")


def write_root(folder: Path) -> tuple[Root, Trained]:
    """The tiny run; the database `green` has its pictures in a tar."""
    root, trained = write_run(folder)
    place = root.local_path("databases/green/pictures/00000.tar")
    place.parent.mkdir()
    with writing(place) as tar:
        for number, picture in enumerate(pictures_of("green")):
            tar.add(key_of(green_id(number)), file_of(picture, "JPEG"), "", {})
    return root, trained


def green_id(number: int) -> int:
    """The image id of a picture of `green`."""
    return schema.image_id(f"databases/green/green-{number}")


def file_of(picture: Image.Image, kind: str = "PNG") -> bytes:
    """A picture as a file."""
    buffer = io.BytesIO()
    picture.save(buffer, kind)
    return buffer.getvalue()


def open_explorer(run: tuple[Root, Trained], **limits: float) -> Explorer:
    """All parts opened, with such limits."""
    sampler = Sampler.open(*run, FORM)
    return Explorer(run[0], ExploreConfig(**limits), sampler.encoder, sampler, FORM)


def open_app(run: tuple[Root, Trained], token: str = "", **limits: float) -> FastAPI:
    """Page and API on the run."""
    return make_app(open_explorer(run, **limits), token=token)
