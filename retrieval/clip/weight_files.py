"""The files of CLIP's weights: whether they changed, without loading them. Does not import torch."""

from collections.abc import Mapping
from pathlib import Path

from retrieval.recipe import ClipConfig
from retrieval.storage.root import file_sha256

SUFFIXES = (".safetensors", ".bin", ".pth")
"""Of the files that open_clip loads from a folder."""
Version = list[int | str]
"""Bytes, time of the last change in ns, and SHA-256 of a file; a list, as JSON returns it."""


def weight_files(config: ClipConfig) -> dict[str, Version]:
    """The files of the weights by name; empty for a tag of open_clip. Reads them."""
    stats = {path: path.stat() for path in _paths(config)}
    return {path.name: [stat.st_size, stat.st_mtime_ns, file_sha256(path)] for path, stat in stats.items()}


def weights_changed(config: ClipConfig, recorded: Mapping[str, Version]) -> bool:
    """Whether a file differs from the recorded one of its name, or from all where its name is not recorded.

    False where no file was recorded, or none is here. A file with name, size and time of a recorded one is not read.
    """
    return bool(recorded) and any(_differs(path, recorded) for path in _paths(config))


def _paths(config: ClipConfig) -> list[Path]:
    folder = Path(config.model.removeprefix("local-dir:"))
    if config.model.startswith("local-dir:") and folder.is_dir():
        return sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES)
    return [path] if (path := Path(config.pretrained)).is_file() else []


def _differs(path: Path, recorded: Mapping[str, Version]) -> bool:
    if path.name not in recorded:
        return file_sha256(path) not in {sha256 for _, _, sha256 in recorded.values()}
    num_bytes, mtime_ns, sha256 = recorded[path.name]
    stat = path.stat()
    return stat.st_size != num_bytes or (stat.st_mtime_ns != mtime_ns and file_sha256(path) != sha256)
