"""PNG files that Pillow refuses to open, with an error that is no OSError."""

import io
import struct
import zlib

from PIL import Image


def png_of_too_many_pixels() -> bytes:
    """Its header states 50,000 x 50,000 pixels."""
    data = _png()
    return data[:8] + _chunk(b"IHDR", struct.pack(">2I", 50_000, 50_000) + data[24:29]) + data[33:]


def png_with_a_text_bomb() -> bytes:
    """A compressed text of 4 MiB before the pixels."""
    data = _png()
    return data[:33] + _chunk(b"zTXt", b"comment\0\0" + zlib.compress(bytes(4 << 20))) + data[33:]


def _png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "PNG")
    return buffer.getvalue()


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
