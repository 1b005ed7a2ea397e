"""Lists the pictures of a source in a fixed order with their metadata and styles.

Takes a folder, a tar or a table (`folders.py`, `tables.py`). Whatever is left out is counted by its reason.
"""

import shlex
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.databases.folders import REPEATED, UNPACKING, folder_items, hub_folder, snapshot, tar_items
from pipeline.databases.labels import folder_labels
from pipeline.databases.sources import SUFFIXES, Item, PictureSource, SourcePicture, source_picture
from pipeline.databases.tables import TABLES, has_images, image_items, path_items
from retrieval.errors import UserError
from retrieval.storage.listing import deletion_named, described, safe_text


@dataclass(frozen=True)
class Listing:
    """The pictures of a source, sorted by name."""

    pictures: list[SourcePicture]
    missing: int
    """Rows of a table without a path or without their file."""
    left_out: Counter[str]
    """Files that are left out, by reason."""


@deletion_named()
def list_pictures(source: PictureSource) -> Listing:
    """The pictures of a source. Raises UserError for a source that cannot be read, has no picture or changes."""
    left_out: Counter[str] = Counter()
    items: dict[str, Item] = {}
    missing = 0
    for item in _items(source, left_out):
        if item is None:
            missing += 1
        else:
            left_out[REPEATED] += not _add(items, item)
    if not items:
        note = f"; {missing} rows of the table name no file that exists" if missing else ""
        note += f"; left out: {described(left_out)}" if left_out.total() else ""
        raise UserError(f"{source.path} has no picture ({' '.join(SUFFIXES)}){note}. Use another source.")
    ordered = [items[name] for name in sorted(items)]
    labels = folder_labels([item.folders for item in ordered])
    pictures = [source_picture(item, label, source) for item, label in zip(ordered, labels, strict=True)]
    return Listing(pictures, missing, +left_out)


def _add(items: dict[str, Item], item: Item) -> bool:
    """Add a picture under its name. False if it is there, or if another has its name and neither an `other_name`."""
    other = items.setdefault(item.name, item)
    if other is item:
        return True
    if other.content == item.content or other.content.read() == item.content.read():
        return False
    renamed = item if item.other_name else other  # a file with a readable name keeps its path
    if not renamed.other_name or renamed.other_name in items:
        return False
    items[item.name] = other if renamed is item else item
    items[renamed.other_name] = renamed._replace(name=renamed.other_name)
    return True


def _items(source: PictureSource, left_out: Counter[str]) -> Iterator[Item | None]:
    path, suffix = source.path, source.path.suffix.lower()
    if path.is_dir():
        yield from folder_items(snapshot(path), left_out)
    elif suffix == ".tar" and path.is_file():
        yield from tar_items(path, path.stem, left_out)
    elif suffix in TABLES and path.is_file():
        if has_images(path):
            yield from image_items(path, safe_text(path.stem), left_out)
        else:
            yield from path_items(path, _roots(source))
    else:
        message = f"{path} is no existing folder, .tar, {', '.join(TABLES[:-1])} or {TABLES[-1]}."
        if path.is_file() and suffix in UNPACKING:
            raise UserError(f"{message} Run: {UNPACKING[suffix]} {shlex.quote(str(path))} and name the unpacked file.")
        raise UserError(f"{message} Check the path; unpack another archive first.")


def _roots(source: PictureSource) -> list[Path]:
    """The folder that the paths of a table are relative to, and the files of its Hugging Face cache."""
    folder = (source.images or source.path.parent).resolve()
    hub = hub_folder(folder)
    return [folder, (hub / "blobs").resolve()] if hub else [folder]
