"""Faces are blurred where the metadata has boxes, and nowhere else; boxes that cannot be read refuse the picture."""

import io
import json

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageOps

from pipeline.download.image_download import SplitSettings, Stated, stored_image
from pipeline.pictures.faces import blur, parse_boxes
from pipeline.pictures.picture import prepare
from retrieval.pictures.decode import PictureError

BOX = (0.25, 0.5, 0.5, 0.8)
SETTINGS = SplitSettings(edge=0, min_edge=1, max_pixels=1 << 20, quality=95, threads=1, min_answered=0.0)
Pixels = npt.NDArray[np.uint8]


def noise(height: int, width: int) -> Pixels:
    """A picture with detail everywhere."""
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def jpeg(pixels: Pixels, orientation: int = 1) -> bytes:
    image, buffer = Image.fromarray(pixels), io.BytesIO()
    image.getexif()[0x0112] = orientation
    image.save(buffer, "JPEG", quality=95, exif=image.getexif())
    return buffer.getvalue()


def detail(pixels: Pixels) -> float:
    """Mean difference between neighbors in a row."""
    return float(np.abs(np.diff(pixels.astype(int), axis=1)).mean())


def changed(before: Pixels, after: Pixels) -> tuple[slice, slice]:
    """The smallest rectangle that has all changed pixels."""
    rows, columns = np.nonzero((before != after).any(axis=2))
    return slice(rows.min(), rows.max() + 1), slice(columns.min(), columns.max() + 1)


@pytest.mark.parametrize("size", [(100, 200), (600, 400), (24, 30)])
def test_a_box_loses_its_detail_and_the_rest_of_the_picture_does_not_change(size: tuple[int, int]) -> None:
    before = noise(*size)
    after, again = before.copy(), before.copy()
    blur(after, BOX)
    blur(again, BOX)
    np.testing.assert_array_equal(after, again)
    height, width = size
    inside = slice(int(0.5 * height), int(0.8 * height)), slice(int(0.25 * width), int(0.5 * width))
    assert detail(after[inside]) < 0.2 * detail(before[inside])
    margin = 0.2 * np.hypot(0.25 * width, 0.3 * height) + 2
    rows, columns = changed(before, after)
    assert rows.start >= 0.5 * height - margin
    assert rows.stop <= 0.8 * height + margin
    assert columns.start >= 0.25 * width - margin
    assert columns.stop <= 0.5 * width + margin


def test_a_jpeg_that_would_keep_its_bytes_is_decoded_and_blurred() -> None:
    body = jpeg(noise(80, 100))
    assert prepare(body, 10_000, 0).keeps_bytes
    picture = prepare(body, 10_000, 0, [BOX])
    assert not picture.keeps_bytes
    before = np.asarray(Image.open(io.BytesIO(body)))
    after = np.asarray(Image.open(io.BytesIO(picture.data)))
    assert detail(after[40:64, 25:50]) < 0.2 * detail(before[40:64, 25:50])
    np.testing.assert_array_equal(after[:20], before[:20])
    assert picture.phash == prepare(body, 10_000, 0).phash


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_picture_is_blurred_where_the_box_is_before_and_after_turning(orientation: int) -> None:
    body = jpeg(noise(90, 120), orientation)
    after = np.asarray(Image.open(io.BytesIO(prepare(body, 20_000, 0, [BOX]).data)))
    stored = Image.fromarray(np.zeros((90, 120), np.uint8))
    stored.paste(255, (30, 45, 60, 72))
    stored.getexif()[0x0112] = orientation
    in_stored = np.asarray(ImageOps.exif_transpose(stored)) > 0
    height, width = after.shape[:2]
    in_upright = np.zeros((height, width), bool)
    in_upright[int(0.5 * height) : int(0.8 * height), int(0.25 * width) : int(0.5 * width)] = True
    original = np.asarray(Image.open(io.BytesIO(prepare(body, 20_000, 0).data)))
    for mask in (in_stored, in_upright):
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
        assert detail(after[box]) < 0.25 * detail(original[box])


@pytest.mark.parametrize("text", [None, "", "[]"])
def test_a_picture_without_boxes_is_stored_as_it_is(text: str | None) -> None:
    body = jpeg(noise(40, 50))
    assert parse_boxes(text) == []
    assert stored_image(body, SETTINGS, Stated(face_boxes=text)) == stored_image(body, SETTINGS)


@pytest.mark.parametrize(
    "text",
    [
        "no JSON",
        f"[[{'9' * 400}, 0, 1, 1]]",
        "7",
        "[0.1, 0.1, 0.2, 0.2]",
        "[[0.1, 0.1, 0.2]]",
        "[[0.1, 0.1, 0.2, NaN]]",
        "[[0.3, 0.1, 0.2, 0.2]]",
        "[[10, 20, 60, 80]]",
        '{"left": 0.1}',
        json.dumps([[0.1, 0.1, 0.2, 0.2]] * 1001),
        "[" * 100_000,
    ],
)
def test_a_picture_with_boxes_that_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(PictureError, match="its face boxes are"):
        parse_boxes(text)
    status, stored = stored_image(jpeg(noise(40, 50)), SETTINGS, Stated(face_boxes=text))
    assert (status.reason, stored) == ("bad_face_boxes", b"")


def test_boxes_are_cut_at_the_edges_of_the_picture() -> None:
    assert parse_boxes("[[-0.1, 0.5, 1.02, 1.2]]") == [(0.0, 0.5, 1.0, 1.0)]
