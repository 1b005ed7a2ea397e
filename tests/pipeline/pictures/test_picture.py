"""Pictures of all formats, good and damaged, through `prepare` and `encode_jpeg`."""

import io
from contextlib import suppress

import cv2
import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from pipeline.pictures import Picture, PictureError, encode_jpeg, prepare

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
    for options in ({}, {"progressive": True}, {"exif": Image.Exif().tobytes()}):
        body = encoded(solid("RGB", COLOR), "JPEG", **options)
        assert prepare(body, 10_000, 0) == Picture(body, (50, 40), keeps_bytes=True)
        assert prepare(body, 10_000, 40) == Picture(body, (50, 40), keeps_bytes=True)


@pytest.mark.parametrize(("max_edge", "width"), [(199, 400), (101, 400), (100, 200), (51, 200), (50, 100), (20, 50)])
def test_a_large_jpeg_is_decoded_reduced_but_never_below_the_target_edge(max_edge: int, width: int) -> None:
    body = encoded(solid("RGB", COLOR).resize((400, 200)), "JPEG", quality=95)
    picture = prepare(body, 100_000, max_edge)
    assert (picture.size, picture.keeps_bytes) == ((400, 200), False)
    decoded = cv2.imdecode(np.frombuffer(picture.data, np.uint8), cv2.IMREAD_UNCHANGED)
    assert decoded.shape == (width // 2, width, 3)
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
    for limit in (80_000_000, 1999):
        assert error_reason(bomb, limit) == "too_many_pixels"
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


def test_resized_pictures_equal_those_of_img2dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_ALBUMENTATIONS_UPDATE", "1")
    from img2dataset.resizer import Resizer

    resize = Resizer(image_size=64, resize_mode="keep_ratio", resize_only_if_bigger=True, encode_quality=95)
    rng = np.random.default_rng(0)
    for width, height in rng.integers(20, 400, (40, 2)):
        noise = rng.integers(0, 255, (height, width, 3), dtype=np.uint8)
        body = encoded(Image.fromarray(noise), "PNG")
        jpeg = encode_jpeg(prepare(body, 160_000, 64), 64, 95)
        assert resize(io.BytesIO(body)) == (jpeg.data, *jpeg.size, *jpeg.original_size, None)
