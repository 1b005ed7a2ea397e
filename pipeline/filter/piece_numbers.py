"""The numbers of the pieces of metadata, which name the shards of filter and of all later stages.

Reads and writes `filter/piece_files.json`: by number, the file of every piece that the filter ever had. A file keeps
its numbers if others are added or removed, because `download` looks for the pictures of a piece under its number.
"""

from collections.abc import Iterable, Mapping

from retrieval.storage.root import Root

PIECE_FILES = "piece_files.json"
"""In the folder of filter; stays there if the stage is made again."""


def known_pieces(root: Root) -> dict[str, str]:
    """The file of each piece that the filter ever had, by the name of the piece; empty before the first run."""
    if stored := root.find_json(f"filter/{PIECE_FILES}"):
        return dict(stored)
    # Earlier versions numbered all pieces anew in each run. The manifest has the numbers of the last one.
    manifest = root.find_json("filter/manifest.json") or {}
    return {name: file for name, (file, *_) in manifest.get("values", {}).get("pieces", {}).items()}


def remember_pieces(root: Root, pieces: Mapping[str, str]) -> None:
    """Store the file of each piece, unless these are stored already."""
    if pieces and root.find_json(f"filter/{PIECE_FILES}") != pieces:
        root.write_json(f"filter/{PIECE_FILES}", dict(pieces))


def number_pieces(files: Iterable[str], known: Mapping[str, str]) -> list[int]:
    """The number of each piece. files: the file of each piece, in order; known: as from `known_pieces`.

    The pieces of a known file have its numbers; others have the numbers after the highest known one.
    """
    numbers_of_file: dict[str, list[int]] = {}
    for name in sorted(known, key=int, reverse=True):
        numbers_of_file.setdefault(known[name], []).append(int(name))
    following = max(map(int, known), default=-1) + 1
    numbers = []
    for file in files:
        if remaining := numbers_of_file.get(file):
            numbers.append(remaining.pop())
        else:
            numbers.append(following)
            following += 1
    return numbers
