"""Numbers of rows that each stage kept or dropped, and of URLs by download status, from tables and manifests."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from retrieval.storage import schema
from retrieval.storage.manifest import read_manifest
from retrieval.storage.root import Root

STORED = "stored"


@dataclass(frozen=True)
class Step:
    """Rows that a stage kept, by split, and rows that it dropped by reason, most frequent first."""

    name: str
    about: str
    train: int
    database: int
    reasons: tuple[tuple[str, int], ...]

    @property
    def lost(self) -> int:
        """Rows that this stage dropped."""
        return sum(count for _, count in self.reasons)


@dataclass(frozen=True)
class Status:
    """Number of URLs with a download status: `stored`, or a reason word."""

    word: str
    train: int
    database: int


def steps(root: Root) -> list[Step]:
    """The stages from the metadata to the neighbor tables, in order."""
    downloads = statuses(root)
    stored = next((status for status in downloads if status.word == STORED), Status(STORED, 0, 0))
    failed = {status.word: status.train + status.database for status in downloads if status.word != STORED}
    filtered, embedded = (
        [num_rows(root, f"{stage}/{split}") for split in schema.SPLITS] for stage in ("filter", "embed")
    )
    joined = num_rows(root, "neighbors"), read_manifest(root, "index").rows
    return [
        Step("filter", "rows selected", filtered[0], filtered[1], _ranked(_reasons(root, "filter"))),
        Step("download", "pictures stored", stored.train, stored.database, _ranked(failed)),
        Step("embed", "CLIP vectors", embedded[0], embedded[1], _ranked(_reasons(root, "embed"))),
        Step("neighbors", "pictures joined with the index", *joined, _ranked(_reasons(root, "neighbors"))),
    ]


def statuses(root: Root) -> list[Status]:
    """Every download status, `stored` first, then by frequency."""
    counts = {split: _words(root, split) for split in schema.SPLITS}
    total = counts["train"] + counts["database"]
    words = sorted(total, key=lambda word: (word != STORED, -total[word], word))
    return [Status(word, counts["train"][word], counts["database"][word]) for word in words]


def num_rows(root: Root, folder: str) -> int:
    """Rows of all Parquet files below a folder."""
    total = 0
    for name in root.list(folder, ".parquet"):
        with root.open(name) as file:
            total += pq.ParquetFile(file).metadata.num_rows
    return total


def _words(root: Root, split: str) -> Counter[str]:
    words: Counter[str] = Counter()
    for name in root.list(f"download/{split}", ".parquet"):
        table: pa.Table = schema.read_table(root, name, schema.DOWNLOADED)
        words.update(reason or STORED for reason in table["reason"].to_pylist())
    return words


def _reasons(root: Root, stage: str) -> dict[str, int]:
    return read_manifest(root, stage).reasons


def _ranked(reasons: Mapping[str, int]) -> tuple[tuple[str, int], ...]:
    return tuple(sorted(reasons.items(), key=lambda item: (-item[1], item[0])))
