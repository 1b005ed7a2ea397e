"""WebDataset tars with deterministic bytes.

A sample consists of the consecutive members `<key>.jpg` or `<key>.webp`, `<key>.txt` and `<key>.json`. The tars hold
no times, owners or modes of the machine, so that equal samples give equal files.
"""

import json
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from retrieval.storage.schema import PICTURE_SUFFIXES

_EMPTY_HEADER = tarfile.TarInfo().tobuf(tarfile.USTAR_FORMAT)
"""Of a file with mode 644, without name, bytes, times and owners."""


class TarWriter:
    """Appends samples to a tar. Writes the bytes of `tarfile` in USTAR format, at a fraction of its cost."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def add(self, key: str, picture: bytes, caption: str, metadata: dict[str, Any]) -> int:
        """Append one sample. picture: a JPEG or WebP file. metadata: must be serializable as JSON.

        Returns the offset of the picture in the tar.
        """
        offset = self._file.tell() + tarfile.BLOCKSIZE
        text = json.dumps(metadata, sort_keys=True, ensure_ascii=False)
        jpg, webp = PICTURE_SUFFIXES
        suffix = webp if picture.startswith(b"RIFF") else jpg
        for end, data in ((suffix, picture), (".txt", caption.encode()), (".json", text.encode())):
            self._file.writelines((_header(f"{key}{end}", len(data)), data, bytes(-len(data) % tarfile.BLOCKSIZE)))
        return offset


def _header(name: str, num_bytes: int) -> bytes:
    header = bytearray(_EMPTY_HEADER)
    header[: len(name)] = name.encode("ascii")
    header[124:136] = b"%011o\0" % num_bytes
    header[148:156] = b" " * 8  # the checksum counts its own bytes as spaces
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


@contextmanager
def tar_writer(path: Path) -> Iterator[TarWriter]:
    """A tar at a local path; complete when the block ends."""
    with path.open("wb", buffering=1 << 20) as file:
        yield TarWriter(file)
        file.write(bytes(2 * tarfile.BLOCKSIZE))
        file.write(bytes(-file.tell() % tarfile.RECORDSIZE))


def picture_ranges(path: Path) -> dict[str, tuple[int, int]]:
    """Offset and size in bytes of each picture in a local tar, by its key."""
    with tarfile.open(path, "r:") as tar:
        return {
            member.name.partition(".")[0]: (member.offset_data, member.size)
            for member in tar
            if member.name.endswith(PICTURE_SUFFIXES)
        }


@contextmanager
def picture_reader(path: Path) -> Iterator[Callable[[str], bytes]]:
    """A function that reads the picture of a key from a local tar, in any order."""
    ranges = picture_ranges(path)
    with path.open("rb") as file:

        def read(key: str) -> bytes:
            offset, size = ranges[key]
            file.seek(offset)
            return file.read(size)

        yield read
