"""Unusual picture files: each has the format of its name and shows the scene."""

from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from jobs.demo.world.content import Content, Scene
from jobs.demo.world.pictures import Drawing, write_picture
from jobs.demo.world.scenes import draw
from jobs.demo.world.styles import STYLES

SCENE = Scene(Content("star", "red", "sea", 1, ""), STYLES[0], 7)


def unusual_picture(tmp_path: Path, file_format: str, suffix: str) -> Path:
    write_picture(tmp_path, Drawing(f"picture.{suffix}", SCENE, 200, 120, file_format))
    return tmp_path / f"picture.{suffix}"


def test_exif_turns_a_rotated_picture_upright(tmp_path: Path) -> None:
    image = Image.open(unusual_picture(tmp_path, "exif", "jpg"))
    assert (image.size, image.getexif()[0x0112]) == ((120, 200), 6)
    upright = np.asarray(ImageOps.exif_transpose(image), dtype=np.float32)
    assert np.abs(upright - draw(SCENE, 200, 120)).mean() < 8


def test_a_16_bit_png_has_the_drawing_in_16_bits(tmp_path: Path) -> None:
    pixels = cv2.imread(str(unusual_picture(tmp_path, "png16", "png")), cv2.IMREAD_UNCHANGED)
    assert pixels is not None
    assert pixels.dtype == np.uint16
    assert np.array_equal(pixels[:, :, ::-1] // 257, draw(SCENE, 200, 120))


@pytest.mark.parametrize(
    ("file_format", "suffix", "mode", "frames"),
    [("gray", "jpg", "L", 1), ("alpha", "png", "RGBA", 1), ("palette", "png", "P", 1), ("animated", "gif", "P", 2)],
)
def test_unusual_formats_match_their_names(
    tmp_path: Path, file_format: str, suffix: str, mode: str, frames: int
) -> None:
    image = Image.open(unusual_picture(tmp_path, file_format, suffix))
    assert (image.mode, getattr(image, "n_frames", 1), image.size) == (mode, frames, (200, 120))


def test_a_picture_is_written_atomically_and_not_in_place(tmp_path: Path) -> None:
    path = unusual_picture(tmp_path, "jpg", "jpg")
    with path.open("rb") as reader:
        unusual_picture(tmp_path, "gray", "jpg")
        assert Image.open(reader).mode == "RGB"
    assert [file.name for file in tmp_path.iterdir()] == ["picture.jpg"]
