"""WebDataset tars whose bytes depend on their content alone.

A sample is the members `<key>.jpg`, `<key>.txt` and `<key>.json`, side by side. No times, owners or
modes of the machine go in.
"""

import io
import json
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def key_of(image_id: int) -> str:
    """The name of an image in a tar: its id's 64 bits in hex.

    >>> key_of(-1)
    'ffffffffffffffff'
    """
    return f"{image_id & (1 << 64) - 1:016x}"


class TarWriter:
    """Appends samples to a tar."""

    def __init__(self, tar: tarfile.TarFile) -> None:
        self._tar = tar

    def add(self, key: str, picture: bytes, caption: str, facts: dict[str, Any]) -> None:
        """Append one sample. picture: a JPEG file; facts: anything JSON can hold."""
        described = json.dumps(facts, sort_keys=True, ensure_ascii=False)
        members = {"jpg": picture, "txt": caption.encode(), "json": described.encode()}
        for kind, data in members.items():
            member = tarfile.TarInfo(f"{key}.{kind}")  # times and owners are 0 unless set
            member.size = len(data)
            self._tar.addfile(member, io.BytesIO(data))


@contextmanager
def writing(path: Path) -> Iterator[TarWriter]:
    """A tar at a local path, complete when the block ends."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        yield TarWriter(tar)


def places(path: Path, suffix: str) -> dict[str, tuple[int, int]]:
    """Offset and size in bytes of each member with a suffix, by its name without it."""
    with tarfile.open(path, "r:") as tar:
        return {
            member.name.removesuffix(suffix): (member.offset_data, member.size)
            for member in tar
            if member.name.endswith(suffix)
        }


@contextmanager
def reading(path: Path) -> Iterator[Callable[[str], bytes]]:
    """The pictures of a local tar by key, in any order."""
    found = places(path, ".jpg")
    with path.open("rb") as file:

        def picture(key: str) -> bytes:
            offset, size = found[key]
            file.seek(offset)
            return file.read(size)

        yield picture
