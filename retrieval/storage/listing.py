"""Which files of a folder or an archive from outside are data.

Tools leave files beside the data: copies of notebooks, thumbnails, resource forks, unfinished output. Every listing
of files that the project did not write uses this module, and tells the user what it left out and why.
"""

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from retrieval.errors import UserError

HIDDEN = "hidden or left by a tool"
LINKED_FOLDER = "a link to a folder"
OUTSIDE = "a link that leaves the folder or leads nowhere"
UNREADABLE = "not a readable file"
TOOL_NAMES = frozenset(
    {
        *("__macosx", "icon\r", "thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin", "system volume information"),
        *("_temporary", "_spark_metadata", "_delta_log", "_success", "_started", "_committed", "__pycache__"),
        *("@eadir", "#recycle", "lost+found"),
    }
)
"""Names of files and folders of tools, in lower case, that do not begin with a dot."""


def is_hidden(name: str, hidden_prefixes: str = ".") -> bool:
    """Whether a relative path is no data: a part begins with a hidden prefix (also ..) or is named as a tool's file.

    >>> [is_hidden(name) for name in ("baroque/0.jpg", "./baroque/0.jpg", "baroque/._0.jpg", "__MACOSX/0.jpg")]
    [False, False, True, True]
    """
    parts = [part for part in re.split(r"[/\\]", name) if part not in ("", ".")]
    return any(part[0] in hidden_prefixes or part.lower() in TOOL_NAMES for part in parts)


def data_names(names: Sequence[str], hidden_prefixes: str = ".") -> tuple[list[str], Counter[str]]:
    """The names that are data, sorted, and the number of the others by reason.

    hidden_prefixes: first characters of hidden names; Spark and pyarrow write `_` before names that are no tables.
    """
    kept = sorted(name for name in names if not is_hidden(name, hidden_prefixes))
    return kept, +Counter({HIDDEN: len(names) - len(kept)})


def list_files(folder: Path, link_targets: Sequence[Path] = ()) -> tuple[list[str], Counter[str]]:
    """Relative paths, with /, of the data files at any depth, sorted, and the number of the others by reason.

    A hidden folder counts as one. Links to files in the folder or in one of `link_targets` are followed.
    """
    names: list[str] = []
    left_out: Counter[str] = Counter()
    roots = [folder.resolve(), *(target.resolve() for target in link_targets)]
    for base, folders, files in os.walk(folder):
        kept = []
        for name in folders:
            reason = HIDDEN if is_hidden(name) else LINKED_FOLDER if Path(base, name).is_symlink() else ""
            left_out[reason] += 1
            kept += [] if reason else [name]
        folders[:] = kept
        for name in files:
            reason = HIDDEN if is_hidden(name) else _file_reason(Path(base, name), roots)
            left_out[reason] += 1
            names += [] if reason else [Path(base, name).relative_to(folder).as_posix()]
    del left_out[""]
    return sorted(names), left_out


def _file_reason(path: Path, roots: Sequence[Path]) -> str:
    """Why a file is left out; "" if it is not."""
    if path.is_symlink() and not (path.exists() and is_inside(path, roots)):
        return OUTSIDE
    return "" if path.is_file() and os.access(path, os.R_OK) else UNREADABLE


def is_inside(path: Path, roots: Sequence[Path]) -> bool:
    """Whether a path, with its links resolved, is in one of the resolved folders."""
    target = path.resolve()
    return any(target.is_relative_to(root) for root in roots)


def safe_text(text: str) -> str:
    """Text that can be written as UTF-8. Bytes of a file name that are no UTF-8 are read as Latin-1.

    >>> safe_text(b"d\\xfcrer.jpg".decode("utf-8", "surrogateescape"))
    'dürer.jpg'
    """
    if text.isascii():
        return text
    try:
        data = text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return text.encode("utf-8", "replace").decode()
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data.decode("latin-1")


def escaped_text(text: str) -> str:
    """As `safe_text`, but bytes of a file name that are no UTF-8 become %XX: different names stay different.

    >>> escaped_text(b"d\\xfcrer.jpg".decode("utf-8", "surrogateescape"))
    'd%FCrer.jpg'
    """
    return safe_text(re.sub("[\\udc80-\\udcff]", lambda found: f"%{ord(found[0]) - 0xDC00:02X}", text))


@contextmanager
def deletion_named() -> Iterator[None]:
    """Raises UserError with the name of a file that the block does not find. For files that were listed before."""
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(
            f"{error.filename or error} was deleted or renamed while it was read. Run again, and leave the files as"
            " they are until the end."
        ) from error


def described(counts: Counter[str]) -> str:
    """Counts as text, the largest first: '3 hidden or left by a tool, 1 of another kind (.psd)'."""
    return ", ".join(f"{count} {reason}" for reason, count in counts.most_common() if count)
