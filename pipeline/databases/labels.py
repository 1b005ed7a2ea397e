"""Styles: the label of a picture from its folders, and a database name for each label."""

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence

SPLIT = re.compile(
    r"(train|training|test|testing|val|valid|validation|dev)([-_ ]?(set|split|data|images|\d{1,4}))?|data|images?|imgs?"
)
"""Names of folders that can contain the folders of the styles, in lower case."""
MAX_NAME_CHARACTERS = 60
Folders = tuple[str, ...]


def folder_labels(folders: Sequence[Folders]) -> list[str]:
    """The style of each picture: its first folder that is no split and does not contain all styles; "" if none.

    >>> folder_labels([("train", "baroque"), ("test", "cubism")])
    ['baroque', 'cubism']
    >>> folder_labels([("artbench", "train", "baroque"), ("artbench", "test", "cubism", "early")])
    ['baroque', 'cubism']
    """
    rest = [_without_splits(parts) for parts in folders]
    while rest and all(len(parts) > 1 for parts in rest) and len({parts[0] for parts in rest}) == 1:
        rest = [_without_splits(parts[1:]) for parts in rest]
    return [parts[0] if parts else "" for parts in rest]


def _without_splits(parts: Folders) -> Folders:
    while parts and SPLIT.fullmatch(parts[0].lower()):
        parts = parts[1:]
    return parts


def database_names(labels: Iterable[str], reserved: str) -> dict[str, str]:
    """The label of each database, by its name: letters and digits of any script in lower case, joined by _.

    Labels that would give one name, the name `reserved` or none get a hash of the label appended.

    >>> database_names(["Early Work", "浮世絵"], "all")
    {'early_work': 'Early Work', '浮世絵': '浮世絵'}
    """
    names = {label: _name(label) for label in labels}
    counts = Counter(names.values())
    return {
        name if name and counts[name] == 1 and name != reserved else f"{name or 'style'}_{_hash(label)}": label
        for label, name in names.items()
    }


def _name(label: str) -> str:
    # NFKC: file systems treat composed and decomposed letters as equal.
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", label).casefold())
    letters = (char if char.isalnum() or unicodedata.category(char).startswith("M") else " " for char in text)
    return "_".join("".join(letters).split())[:MAX_NAME_CHARACTERS]


def _hash(label: str) -> str:
    return hashlib.sha256(label.encode()).hexdigest()[:6]
