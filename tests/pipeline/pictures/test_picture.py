"""Pictures of all formats, good and damaged, through `prepare` and `encode`."""

import io
from contextlib import suppress
from typing import Literal

import cv2
import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from pipeline.pictures import Picture, encode, prepare
from retrieval.pictures import PictureError
from tests.retrieval.pictures.icc_profiles import srgb_profile, wide_profile

COLOR = (10, 200, 30)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def solid(mode: str, color: object) -> Image.Image:
    return Image.new(mode, (50, 40), color)  # type: ignore[arg-type]


def error_reason(body: bytes, max_pixels: int = 10_000) -> str:
    """The reason with which a body is refused."""
    with pytest.raises(PictureError) as caught:
        prepare(body, max_pixels, 0)
    return str(caught.value.reason)


def pixels(body: bytes, max_pixels: int = 10_000) -> npt.NDArray[np.uint8]:
    """The prepared picture as OpenCV decodes it: (height, width, 3) RGB."""
    picture = prepare(body, max_pixels, 0)
    decoded = cv2.imdecode(np.frombuffer(picture.data, np.uint8), cv2.IMREAD_UNCHANGED)
    assert decoded is not None
    assert decoded.dtype == np.uint8
    return decoded[..., ::-1]


def test_a_plain_jpeg_that_is_not_reduced_keeps_its_bytes() -> None:
    for options in ({}, {"progressive": True}, {"subsampling": 0, "restart_marker_blocks": 1}):
        body = encoded(solid("RGB", COLOR), "JPEG", **options)
        assert prepare(body, 10_000, 0) == Picture(body, (50, 40), keeps_bytes=True)
        assert prepare(body, 10_000, 40) == Picture(body, (50, 40), keeps_bytes=True)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("max_edge", [199, 51, 20])
def test_a_larger_picture_is_reduced_to_the_shorter_edge(kind: str, max_edge: int) -> None:
    body = encoded(solid("RGB", COLOR).resize((400, 200)), kind)
    picture = prepare(body, 100_000, max_edge)
    assert (picture.size, picture.keeps_bytes) == ((400, 200), False)
    decoded = cv2.imdecode(np.frombuffer(picture.data, np.uint8), cv2.IMREAD_UNCHANGED)
    assert decoded.shape == (max_edge, 2 * max_edge, 3)
    assert np.abs(decoded[..., ::-1].astype(int) - COLOR).max() <= 2


@pytest.mark.parametrize(
    "body",
    [
        encoded(solid("RGB", COLOR), "PNG"),
        encoded(solid("RGB", COLOR), "BMP"),
        encoded(solid("RGB", COLOR), "TIFF"),
        encoded(solid("RGB", COLOR), "WEBP", lossless=True),
        encoded(solid("RGB", COLOR).quantize(4), "PNG"),
        encoded(solid("RGB", COLOR), "GIF", save_all=True, append_images=[solid("RGB", "white")]),
        encoded(solid("RGB", COLOR), "PNG", save_all=True, append_images=[solid("RGB", "white")]),
        encoded(solid("RGBA", (*COLOR, 255)), "PNG"),
    ],
)
def test_every_format_gives_its_first_frame_in_rgb(body: bytes) -> None:
    assert np.abs(pixels(body).astype(int) - COLOR).max() <= 1


def test_gray_and_bilevel_pictures_become_rgb() -> None:
    assert (pixels(encoded(solid("L", 99), "JPEG")) == 99).all()
    assert (pixels(encoded(solid("1", 1), "PNG")) == 255).all()


def test_cmyk_is_converted_to_rgb() -> None:
    assert np.abs(pixels(encoded(solid("CMYK", (0, 255, 255, 0)), "JPEG")).astype(int) - (255, 0, 0)).max() < 3


@pytest.mark.parametrize("kind", [".png", ".tiff"])
def test_sixteen_bits_are_scaled_and_not_clipped(kind: str) -> None:
    ramp = np.linspace(0, 65535, 256 * 4).reshape(4, 256).astype(np.uint16)
    for picture in (ramp, np.dstack([ramp] * 3)):
        if kind == ".tiff" and picture.ndim == 3:
            continue
        body = cv2.imencode(kind, picture)[1].tobytes()
        assert np.abs(pixels(body)[..., 0].astype(int) - (ramp >> 8)).max() <= 1


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_transparent_pixels_become_white(mode: str) -> None:
    image = solid("RGBA", (255, 0, 0, 0))
    image.paste((0, 0, 0, 255), (0, 0, 10, 10))
    body = encoded(image.convert(mode), "PNG") if mode != "PA" else encoded(image.quantize(4), "PNG")
    rgb = pixels(body)
    assert (rgb[30, 30] == 255).all()
    assert (rgb[5, 5] < 10).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_exif_rotation_is_applied(orientation: int) -> None:
    upright = np.zeros((40, 50, 3), np.uint8)
    upright[:20, :25] = COLOR
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: upright.transpose(1, 0, 2)[::-1],
        7: upright.transpose(1, 0, 2)[::-1, ::-1],
        8: upright.transpose(1, 0, 2)[:, ::-1],
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    rgb = pixels(encoded(Image.fromarray(stored.copy()), "JPEG", exif=exif, quality=95))
    assert rgb.shape == upright.shape
    assert np.abs(rgb.astype(int) - upright)[5:15, 5:20].max() < 8
    assert rgb[30:, 30:].max() < 8


def test_a_picture_with_damaged_exif_is_used() -> None:
    body = encoded(solid("RGB", COLOR), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert pixels(body).shape == (40, 50, 3)
    body = encoded(solid("RGB", COLOR), "JPEG", exif=b"Exif\0\0nonsense")
    assert prepare(body, 10_000, 0).keeps_bytes


def test_pixels_are_counted_before_they_are_decoded() -> None:
    bomb = encoded(Image.new("1", (14_000, 14_000)), "PNG")
    assert error_reason(bomb, 80_000_000) == "too_many_pixels"
    body = encoded(solid("RGB", COLOR), "PNG")
    assert prepare(body, 2000, 0).size == (50, 40)
    assert error_reason(body, 1999) == "too_many_pixels"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<!DOCTYPE html><title>Gone</title>",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"%!PS-Adobe-3.0 EPSF-3.0\n",
        bytes(1000),
    ],
)
def test_a_body_that_is_not_a_picture_is_refused(body: bytes) -> None:
    assert error_reason(body) == "not_an_image"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP"])
def test_a_truncated_picture_is_refused_at_every_length(kind: str) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8)
    body = encoded(Image.fromarray(noise), kind)
    for share in (0.3, 0.6, 0.9):
        assert error_reason(body[: int(len(body) * share)]) in ("truncated", "not_an_image")


def test_random_damage_raises_no_other_error() -> None:
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 255, (40, 50, 3), dtype=np.uint8))
    for kind in ("PNG", "GIF", "WEBP", "TIFF", "BMP", "JPEG", "AVIF"):
        body = np.frombuffer(encoded(noise, kind), np.uint8)
        for _ in range(60):
            damaged = body.copy()
            places = rng.integers(0, min(len(body), 400), 6)
            damaged[places] = rng.integers(0, 255, 6)
            with suppress(PictureError):
                prepare(damaged.tobytes(), 10_000, 0)


@pytest.mark.parametrize("size", [(70_000, 40), (40, 70_000)])
def test_a_picture_with_a_longer_edge_than_jpeg_allows_is_refused_or_reduced(size: tuple[int, int]) -> None:
    body = encoded(Image.new("L", size), "PNG")
    for max_edge in (0, 224):
        with pytest.raises(PictureError, match="an edge of more than 65535 pixels") as caught:
            prepare(body, 10_000_000, max_edge)
        assert caught.value.reason == "too_many_pixels"
    assert sorted(encode(prepare(body, 10_000_000, 20), 90).size) == [20, 35_000]


def test_a_progressive_jpeg_with_thousands_of_scans_is_refused() -> None:
    body = encoded(solid("RGB", COLOR), "JPEG", progressive=True)
    last_scan = body.rindex(b"\xff\xda")
    scans = body[last_scan:-2] * 2000
    assert error_reason(body[:last_scan] + scans + b"\xff\xd9") == "too_many_pixels"


def test_private_metadata_are_removed_from_a_kept_jpeg_and_the_rights_stay() -> None:
    exif = Image.Exif()
    exif.update({0x8298: "© Ann Ämilie".encode(), 0x013B: "Ann", 0x927C: b"serial number", 0x010F: "Camera"})
    exif.get_ifd(0x8825).update({1: "N", 2: (51.0, 30.0, 0.0)})
    options = {"exif": exif, "comment": b"from home", "xmp": b"<x:xmpmeta>exif:GPSLatitude</x:xmpmeta>"}
    noise = Image.effect_noise((64, 48), 90).convert("RGB")
    body = encoded(noise, "JPEG", icc_profile=srgb_profile(), **options) + b"a video after the end"
    picture = prepare(body, 10_000, 0)
    assert picture.keeps_bytes
    for word in (b"serial", b"Camera", b"GPS", b"from home", b"video"):
        assert word not in picture.data
    kept = Image.open(io.BytesIO(picture.data))
    assert dict(kept.getexif()) == {0x8298: "© Ann Ämilie".encode().decode("latin-1"), 0x013B: "Ann"}
    assert kept.info["icc_profile"] == srgb_profile()
    assert kept.tobytes() == Image.open(io.BytesIO(body)).tobytes(), "the pixels are those of the download"


def test_a_jpeg_in_adobe_rgb_is_stored_in_srgb() -> None:
    colors = Image.fromarray(np.random.default_rng(0).integers(0, 255, (6, 8, 3), np.uint8)).resize((64, 48))
    body = encoded(colors, "JPEG", icc_profile=wide_profile(), quality=95)
    picture = prepare(body, 10_000, 0)
    assert not picture.keeps_bytes
    difference = pixels(body).astype(int) - np.asarray(colors)
    assert np.abs(difference).mean() > 4, "the colours of the wide profile are other numbers in sRGB"


@pytest.mark.parametrize("image_format", ["jpeg", "webp"])
def test_resized_pictures_equal_those_of_img2dataset(
    image_format: Literal["jpeg", "webp"], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_ALBUMENTATIONS_UPDATE", "1")
    from img2dataset.resizer import Resizer

    resize = Resizer(
        image_size=64,
        resize_mode="keep_ratio",
        resize_only_if_bigger=True,
        encode_quality=95,
        encode_format={"jpeg": "jpg"}.get(image_format, image_format),
    )
    rng = np.random.default_rng(0)
    for width, height in rng.integers(20, 400, (40, 2)):
        noise = rng.integers(0, 255, (height, width, 3), dtype=np.uint8)
        body = encoded(Image.fromarray(noise), "PNG")
        stored = encode(prepare(body, 160_000, 64, image_format=image_format), 95)
        assert resize(io.BytesIO(body)) == (stored.data, *stored.size, *stored.original_size, None)


def test_a_webp_that_is_stored_as_webp_keeps_its_bytes_if_it_has_no_metadata() -> None:
    noise = Image.effect_noise((50, 40), 90).convert("RGB")
    body = encoded(noise, "WEBP", quality=50)
    picture = prepare(body + b"a video after the end", 10_000, 40, image_format="webp")
    assert (picture.data, picture.keeps_bytes, picture.size) == (body, True, (50, 40))
    exif = Image.Exif()
    exif[0x010F] = "Camera"
    clear = Image.new("RGBA", (50, 40), (255, 0, 0, 0))
    encoded_again = [encoded(noise, "WEBP", exif=exif), encoded(noise, "WEBP", lossless=True), encoded(clear, "WEBP")]
    for other in (*encoded_again, encoded(noise, "JPEG")):
        picture = prepare(other, 10_000, 0, image_format="webp")
        stored = encode(picture, 90).data
        assert not picture.keeps_bytes
        assert Image.open(io.BytesIO(stored)).format == "WEBP"
        assert b"Camera" not in stored
    with pytest.raises(PictureError, match="damaged or ends early"):
        prepare(body[:-200], 10_000, 0, image_format="webp")
    with pytest.raises(PictureError, match="an edge of more than 16383 pixels as webp"):
        prepare(encoded(Image.new("L", (16_384, 40)), "PNG"), 10_000_000, 0, image_format="webp")
