"""Lists data files that other programs wrote: without their hidden files, with suffixes in any case."""

from collections.abc import Sequence

from retrieval.storage.root import Root


def data_files(root: Root, suffixes: Sequence[str] = ("",)) -> list[str]:
    """Names of the files below a folder that end with one of the suffixes in any case, sorted.

    As in Spark and pyarrow, files and folders whose names begin with "_" or "." are no data: `_SUCCESS`,
    `_temporary`, `_metadata`, `__MACOSX`, `.ipynb_checkpoints`, `._part.parquet`.
    """
    return [name for name in root.list("") if name.lower().endswith(tuple(suffixes)) and not _is_hidden(name)]


def _is_hidden(name: str) -> bool:
    return any(part.startswith(("_", ".")) for part in name.split("/"))
