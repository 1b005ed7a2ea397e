"""Colours: converts pixels from the colour space of an ICC profile to sRGB.

A profile that cannot be read, that does not fit the pixels, or that nearly equals sRGB is ignored.
"""

import io
from collections.abc import Callable
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

MAX_PROFILE_BYTES = 4 << 20
"""Larger profiles are ignored; those of printing presses have up to 3 MB."""
MAX_SRGB_DIFFERENCE = 2
"""A profile is taken as sRGB if it changes no channel of the test colours by more, of 255."""
GRAY_MODES = ("1", "L", "LA", "La", "I;16", "I;16B", "I;16L")
PIXEL_MODES = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK", "Lab ": "LAB"}
"""Pillow's mode of the pixels of a profile, by the profile's colour space."""
ToSrgb = Callable[[Image.Image], Image.Image]


def srgb_conversion(profile: bytes | None, mode: str) -> ToSrgb:
    """A function that converts images without transparency to RGB. mode: of the stored picture, as in Pillow."""
    if mode == "LAB" and not profile:
        return _profile_conversion(b"", "LAB") or _plain
    if not profile or len(profile) > MAX_PROFILE_BYTES:
        return _plain
    kind = mode if mode in ("CMYK", "LAB") else "L" if mode in GRAY_MODES else "RGB"
    return _profile_conversion(profile, kind) or _plain


def is_srgb(profile: bytes | None) -> bool:
    """Whether RGB pixels with this profile can be read as sRGB."""
    return srgb_conversion(profile, "RGB") is _plain


def _plain(image: Image.Image) -> Image.Image:
    return image.convert("RGB")


@lru_cache(16)
def _profile_conversion(profile: bytes, kind: str) -> ToSrgb | None:
    """The conversion for pixels of a kind (RGB, L, CMYK, LAB), or None if the profile is ignored. b"": CIELAB, D50."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile) if profile else ImageCms.createProfile("LAB"))
        mode = PIXEL_MODES.get(source.profile.xcolor_space, "")
        if mode != kind and (mode, kind) != ("RGB", "L"):
            return None
        target = ImageCms.createProfile("sRGB")
        intent, flags = ImageCms.Intent.RELATIVE_COLORIMETRIC, ImageCms.Flags.BLACKPOINTCOMPENSATION
        transform = ImageCms.buildTransform(source, target, mode, "RGB", intent, flags)
        colors = _test_colors(mode)
        converted = ImageCms.applyTransform(colors, transform)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None
    if mode == "RGB" and converted is not None:
        difference = np.abs(np.asarray(converted, np.int16) - np.asarray(colors, np.int16))
        if difference.max() <= MAX_SRGB_DIFFERENCE:
            return None
    return lambda image: _applied(transform, image.convert(mode) if image.mode != mode else image)


def _test_colors(mode: str) -> Image.Image:
    """A grid of 9 x 9 x 9 RGB colours, or one pixel of another mode."""
    if mode != "RGB":
        return Image.new(mode, (1, 1))
    steps = np.linspace(0, 255, 9).astype(np.uint8)
    return Image.fromarray(np.stack(np.meshgrid(steps, steps, steps), -1).reshape(9, 81, 3))


def _applied(transform: ImageCms.ImageCmsTransform, image: Image.Image) -> Image.Image:
    converted = ImageCms.applyTransform(image, transform)
    assert converted is not None
    return converted
