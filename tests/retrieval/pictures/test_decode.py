"""Pictures of all colour spaces become sRGB, within a budget of memory that threads share."""

import io
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngImageFile

from retrieval import UserError
from retrieval.pictures import decode, read_picture
from retrieval.pictures.budget import DecodeBudget
from retrieval.pictures.decode import PictureError, open_picture, upright_rgb
from tests.retrieval.pictures.icc_profiles import gray_profile, srgb_profile, wide_profile


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


def rgb(body: bytes) -> npt.NDArray[np.int64]:
    """The decoded pixels, (height, width, 3)."""
    with open_picture(body) as image:
        return upright_rgb(image).astype(int)


def linear(srgb: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_adobe_rgb_is_converted_to_srgb_in_every_mode(kind: str, mode: str) -> None:
    color = Image.new("RGB", (8, 6), (120, 140, 60))
    image = color.quantize(4) if mode == "P" else color.convert(mode)
    options = {"lossless": True} if kind == "WEBP" else {}
    pixels = rgb(encoded(image, kind, icc_profile=wide_profile(), **options))
    # Adobe RGB to XYZ to sRGB with the matrices of both standards (D65).
    adobe = (np.array([120, 140, 60]) / 255) ** 2.2
    to_xyz = np.array([[0.57667, 0.18556, 0.18823], [0.29734, 0.62736, 0.07529], [0.02703, 0.07069, 0.99134]])
    to_srgb = np.array([[3.2406, -1.5372, -0.4986], [-0.9689, 1.8758, 0.0415], [0.0557, -0.2040, 1.0570]])
    expected = to_srgb @ to_xyz @ adobe
    assert np.abs(linear(pixels[2, 2] / 255) - expected).max() < 0.01


def test_a_gray_profile_is_applied_to_gray_and_an_rgb_profile_too() -> None:
    gray = Image.new("L", (4, 4), 128)
    assert rgb(encoded(gray, "PNG", icc_profile=gray_profile(1.0)))[0, 0].tolist() == pytest.approx([188] * 3, abs=2)
    assert rgb(encoded(gray, "PNG", icc_profile=srgb_profile()))[0, 0].tolist() == [128] * 3
    deep = Image.fromarray(np.full((4, 4), 128 << 8, np.uint16))
    assert rgb(encoded(deep, "PNG", icc_profile=gray_profile(1.0)))[0, 0].tolist() == pytest.approx([188] * 3, abs=2)
    transparent = Image.new("LA", (4, 4), (128, 0))
    assert rgb(encoded(transparent, "PNG", icc_profile=gray_profile(1.0)))[0, 0].tolist() == [255] * 3


def test_cielab_pixels_are_converted_without_a_profile() -> None:
    lab = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
    image = ImageCms.applyTransform(Image.new("RGB", (4, 4), (200, 80, 120)), lab)
    assert image is not None
    assert np.abs(rgb(encoded(image, "TIFF"))[0, 0] - (200, 80, 120)).max() <= 3


@pytest.mark.parametrize(
    "profile",
    [b"", b"no profile", wide_profile()[:150], bytes(128) + b"\xff" * 400, gray_profile(1.0), b"x" * (5 << 20)],
)
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF"])
def test_a_profile_that_is_damaged_or_of_other_pixels_is_ignored(kind: str, profile: bytes) -> None:
    if kind != "TIFF":
        profile = profile[: 1 << 16]
    color = Image.new("RGB", (8, 8), (120, 140, 60))
    assert np.abs(rgb(encoded(color, kind, icc_profile=profile))[0, 0] - (120, 140, 60)).max() <= 3


def test_strips_give_the_pixels_of_the_whole_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (41, 50, 4), np.uint8))
    for turn in range(1, 9):
        exif = Image.Exif()
        exif[decode.ORIENTATION_TAG] = turn
        body = encoded(image, "PNG", exif=exif)
        whole = rgb(body)
        monkeypatch.setattr(decode, "STRIP_PIXELS", 149)
        assert (rgb(body) == whole).all()
        monkeypatch.undo()


def test_threads_share_the_budget_and_a_picture_that_never_fits_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    body = encoded(Image.new("RGBA", (50, 40)), "WEBP", lossless=True)
    cost = 50 * 40 * 20
    monkeypatch.setattr(decode, "BUDGET", DecodeBudget(2 * cost))
    lock, inside, most = threading.Lock(), 0, 0

    def decoded(_: int) -> None:
        nonlocal inside, most
        with open_picture(body) as image:
            with lock:
                inside += 1
                most = max(most, inside)
            upright_rgb(image)
            with lock:
                inside -= 1

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(decoded, range(40)))
    assert most <= 2
    monkeypatch.setattr(decode, "BUDGET", DecodeBudget(cost - 1))
    with pytest.raises(PictureError, match="decoding takes") as caught, open_picture(body):
        pass
    assert caught.value.reason == "too_many_pixels"


def test_small_shares_do_not_overtake_a_large_one() -> None:
    budget, order = DecodeBudget(10), list[int]()

    def take(num_bytes: int) -> None:
        with budget.share(num_bytes):
            order.append(num_bytes)

    with budget.share(5):
        large = threading.Thread(target=take, args=(10,))
        large.start()
        while not budget._turn.locked():  # the large one waits until its bytes are free
            time.sleep(0.001)
        small = threading.Thread(target=take, args=(1,))
        small.start()
        small.join(0.05)
        assert order == []
    large.join()
    small.join()
    assert order == [10, 1]


def test_an_exception_returns_the_share() -> None:
    budget = DecodeBudget(1)
    with pytest.raises(KeyError), budget.share(1):
        raise KeyError
    with budget.share(1):
        pass


@pytest.mark.parametrize(
    "error", [MemoryError, OverflowError, SyntaxError, AttributeError, Image.DecompressionBombError]
)
def test_any_error_of_a_codec_gives_a_reason(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> None:
        raise error

    body = encoded(Image.new("L", (4, 4)), "PNG")
    for reader, method in ((PngImageFile, "load"), (PngImageFile, "_open")):
        with monkeypatch.context() as patched:
            patched.setattr(reader, method, fail)
            with pytest.raises(PictureError), open_picture(body) as image:
                upright_rgb(image)


def test_an_error_of_other_code_is_not_taken_for_a_damaged_picture() -> None:
    with pytest.raises(AttributeError), open_picture(encoded(Image.new("L", (4, 4)), "PNG")):
        raise AttributeError


def test_a_picture_file_is_read_upright_in_srgb_or_refused(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[decode.ORIENTATION_TAG] = 6
    path = tmp_path / "a.png"
    Image.new("RGB", (8, 6), (120, 140, 60)).save(path, exif=exif, icc_profile=wide_profile())
    image = read_picture(path)
    assert image.size == (6, 8)
    assert image.getpixel((0, 0)) != (120, 140, 60)
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n")
    with pytest.raises(UserError, match=r"a\.png is not a readable picture: no known picture format"):
        read_picture(path)
