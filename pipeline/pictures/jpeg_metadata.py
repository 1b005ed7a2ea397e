"""Removes private metadata from a JPEG without decoding its pixels.

Position, serial numbers, edit history, comments and thumbnails (in EXIF, XMP, IPTC and maker notes) go, and a second
picture or a video after the end. What decoders need stays: the JFIF and Adobe segments and the ICC profile; so do
the artist and the copyright.
"""

import re
from collections.abc import Iterator

from PIL import Image

from retrieval.pictures.decode import BROKEN

RIGHTS_TAGS = (0x013B, 0x8298)
"""EXIF tags of the artist and the copyright."""
MAX_RIGHTS_CHARACTERS = 1000
START, END_OF_IMAGE, START_OF_SCAN, JFIF = b"\xff\xd8", 0xD9, 0xDA, 0xE0
_KEPT = {JFIF: b"JFIF\0", 0xE2: b"ICC_PROFILE\0", 0xEE: b"Adobe"}
"""First bytes of the application segments that are kept, by marker."""
_APPLICATION_OR_COMMENT = {*range(0xE0, 0xF0), 0xFE}
_WITHOUT_LENGTH = {0x00, 0x01, *range(0xD0, 0xD9)}
_NEXT_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")


def without_private_metadata(jpeg: bytes, image: Image.Image) -> bytes | None:
    """The JPEG up to its end without private metadata, or None if its segments are damaged. image: the opened JPEG."""
    try:
        kept = [_without_thumbnail(marker, segment) for marker, segment in _segments(jpeg) if _is_kept(marker, segment)]
    except (IndexError, ValueError):
        return None
    return b"".join([START, _rights(image), *kept])


def _segments(jpeg: bytes) -> Iterator[tuple[int, bytes]]:
    """Marker and bytes of each segment, to the end marker; a scan includes its compressed data. Raises if damaged."""
    position, marker = len(START), 0
    while marker != END_OF_IMAGE:
        while jpeg[position + 1] == 0xFF:  # fill bytes before a marker
            position += 1
        marker, end = jpeg[position + 1], position + 2
        if jpeg[position] != 0xFF or marker in _WITHOUT_LENGTH:
            raise ValueError("no marker of a segment")
        if marker != END_OF_IMAGE:
            end += int.from_bytes(jpeg[end : end + 2])
        if marker == START_OF_SCAN:
            next_marker = _NEXT_MARKER.search(jpeg, end)
            end = next_marker.start() if next_marker else len(jpeg)
        yield marker, jpeg[position:end]
        position = end


def _is_kept(marker: int, segment: bytes) -> bool:
    if marker not in _APPLICATION_OR_COMMENT:
        return True
    return marker in _KEPT and segment.startswith(_KEPT[marker], 4)


def _without_thumbnail(marker: int, segment: bytes) -> bytes:
    return b"\xff\xe0\x00\x10" + segment[4:16] + b"\0\0" if marker == JFIF else segment


def _rights(image: Image.Image) -> bytes:
    """An EXIF segment with the artist and the copyright, or no bytes."""
    try:
        exif = image.getexif()
        texts = {tag: str(exif[tag])[:MAX_RIGHTS_CHARACTERS] for tag in RIGHTS_TAGS if tag in exif}
        rights = Image.Exif()
        rights.update({tag: text.encode("latin-1") for tag, text in texts.items()})
        data = rights.tobytes() if texts else b""
    except BROKEN:
        return b""
    return b"\xff\xe1" + (len(data) + 2).to_bytes(2) + data if data else b""
