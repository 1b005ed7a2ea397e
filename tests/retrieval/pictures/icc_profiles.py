"""ICC profiles for tests, written from their definition."""

import struct

from PIL import ImageCms

ADOBE_RGB = ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457))
"""XYZ of the primaries of Adobe RGB (1998), adapted to D50."""
D50 = (0.9642, 1.0, 0.8249)


def srgb_profile() -> bytes:
    """The sRGB profile of LittleCMS without its date (bytes 24 to 35 of the header), so that all calls are equal."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return profile[:24] + bytes(12) + profile[36:]


def wide_profile(gamma: float = 2.2) -> bytes:
    """A matrix profile with the primaries of Adobe RGB."""
    curve = b"curv" + struct.pack(">IIHxx", 0, 1, round(gamma * 256))
    names = ("rXYZ", "gXYZ", "bXYZ")
    tags = {name: _xyz(primary) for name, primary in zip(names, ADOBE_RGB, strict=True)}
    tags |= {"wtpt": _xyz(D50), "rTRC": curve, "gTRC": curve, "bTRC": curve}
    return _profile(b"RGB ", tags)


def gray_profile(gamma: float) -> bytes:
    """A profile of gray pixels with a gamma curve."""
    curve = b"curv" + struct.pack(">IIHxx", 0, 1, round(gamma * 256))
    return _profile(b"GRAY", {"wtpt": _xyz(D50), "kTRC": curve})


def _xyz(values: tuple[float, ...]) -> bytes:
    return b"XYZ " + struct.pack(">I3i", 0, *(round(value * 65536) for value in values))


def _profile(space: bytes, tags: dict[str, bytes]) -> bytes:
    start = 128 + 4 + 12 * len(tags)
    table, data = struct.pack(">I", len(tags)), b""
    for name, value in tags.items():
        table += name.encode() + struct.pack(">II", start + len(data), len(value))
        data += value
    size = start + len(data)
    header = struct.pack(">I4sI4s4s4s12x4s", size, b"none", 0x02400000, b"mntr", space, b"XYZ ", b"acsp")
    header = header.ljust(68, b"\0") + struct.pack(">3i", *(round(value * 65536) for value in D50))
    return header.ljust(128, b"\0") + table + data
