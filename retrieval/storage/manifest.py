"""Manifests of finished stages (`<stage>/manifest.json`) and records of finished shards
(`<stage>/records/<shard>.json`). A fingerprint of the settings and of the earlier stages makes stale output visible.

The records in a manifest of more than MAX_JSON_SHARDS shards are a Parquet file, `<stage>/shards/<digest>.parquet`,
that manifest.json names: as JSON, 231,350 records took 2 GB of memory.
"""

import hashlib
import json
import platform
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import islice
from typing import Any, cast, overload

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from retrieval.config import Config
from retrieval.errors import UserError, command_of, damage_advice
from retrieval.storage.root import FileRecord, Root

VERSION = "0.1.0"
MAX_JSON_SHARDS = 1_000
"""Most shards whose records are stored in manifest.json itself."""
SHARDS_FILE = re.compile("shards/[0-9a-f]{16}[.]parquet")
BATCH_ROWS = 4_096
"""Records that are converted at once between Arrow and Python."""
FILE = pa.struct({"name": pa.string(), "bytes": pa.int64(), "sha256": pa.string()})
_COUNTS, _NUMBERS, _TEXTS = (
    pa.list_(pa.struct({"key": pa.string(), "value": kind})) for kind in (pa.int64(), pa.float64(), pa.string())
)
"""Dictionaries. Arrow's own map type has no function that flattens it."""
RECORD = pa.schema(
    {
        "shard": pa.string(),
        "rows": pa.int64(),
        "files": pa.list_(FILE),
        "reasons": _COUNTS,
        "values": _NUMBERS,
        "seconds": pa.float64(),
        "inputs": _TEXTS,
    }
)
"""The columns of records as a table, as the fields of ShardRecord."""


@dataclass(frozen=True, slots=True)
class ShardRecord:
    """A finished shard: rows kept, files written, rows left out by reason, and numbers of its stage."""

    shard: str
    rows: int
    files: tuple[FileRecord, ...]
    reasons: dict[str, int] = field(default_factory=dict)
    values: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    inputs: dict[str, str] = field(default_factory=dict)
    """Digests of inputs outside the fingerprint, such as the shard of an earlier stage that it was made from."""

    @property
    def digest(self) -> str:
        """Digest of the content of its files, for the `inputs` of later stages."""
        return _digest([file.sha256 for file in self.files])

    def file(self, suffix: str) -> str:
        """The name of the file with a suffix such as `.tar`. An updated shard has other names than a new one."""
        return next(file.name for file in self.files if file.name.endswith(suffix))


class ShardTable(Sequence[ShardRecord]):
    """Records as an Arrow table with the columns RECORD: 350 bytes each, 2 kB as Python objects, made when read.

    >>> shards = ShardTable.of([ShardRecord("train/00000", 3, ()), ShardRecord("train/00001", 4, (), {"blocked": 1})])
    >>> len(shards), shards[1].reasons, sum(shard.rows for shard in shards)
    (2, {'blocked': 1}, 7)
    """

    def __init__(self, table: pa.Table) -> None:
        self.table = table

    @classmethod
    def of(cls, records: Iterable[ShardRecord]) -> "ShardTable":
        """The records as a table, in their order."""
        if isinstance(records, ShardTable):
            return records
        records = iter(records)
        parts = iter(lambda: list(map(_row, islice(records, BATCH_ROWS))), [])
        return cls(pa.Table.from_batches([pa.RecordBatch.from_pylist(part, RECORD) for part in parts], RECORD))

    def __len__(self) -> int:
        return len(self.table)

    @overload
    def __getitem__(self, index: int) -> ShardRecord: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[ShardRecord]: ...
    def __getitem__(self, index: int | slice) -> ShardRecord | Sequence[ShardRecord]:
        if isinstance(index, slice):
            return ShardTable(self.table.take(pa.array(range(len(self))[index], pa.int64())))
        return next(iter(ShardTable(self.table.slice(range(len(self))[index], 1))))

    def __iter__(self) -> Iterator[ShardRecord]:
        for batch in self.table.to_batches(BATCH_ROWS):
            yield from _records(batch)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and self.table.equals(ShardTable.of(other).table)

    __hash__ = None  # type: ignore[assignment]

    @property
    def files(self) -> pa.StructArray:
        """All files, as FILE, in the order of the shards."""
        return cast(pa.StructArray, self.table["files"].combine_chunks().flatten())

    def where(self, mask: pa.Array | pa.ChunkedArray) -> "ShardTable":
        """The records where a mask is true; if it is everywhere, these, without a copy."""
        is_whole = pc.all(mask, skip_nulls=False).as_py() is True
        return self if is_whole else ShardTable(self.table.filter(mask))

    def inputs(self) -> Iterator[dict[str, str]]:
        """The inputs of each record, made when read."""
        for batch in self.table.to_batches(BATCH_ROWS):
            yield from _maps(batch["inputs"])


def _row(record: ShardRecord) -> dict[str, Any]:
    """A record as `RecordBatch.from_pylist` takes it. Equal records give equal rows."""
    maps = {name: sorted(getattr(record, name).items()) for name in ("reasons", "values", "inputs")}
    files = [(file.name, file.bytes, file.sha256) for file in record.files]
    return {"shard": record.shard, "rows": record.rows, "files": files, "seconds": record.seconds, **maps}


def _records(batch: pa.RecordBatch) -> Iterator[ShardRecord]:
    """The rows of a batch with the columns RECORD. Columns are converted as a whole: ten times as fast as by row."""
    flat = batch["files"].flatten()
    files = map(FileRecord, *(flat.field(name).to_pylist() for name in FILE.names))
    sizes = pc.list_value_length(batch["files"]).to_pylist()
    groups = (tuple(islice(files, size)) for size in sizes)
    maps = (_maps(batch[name]) for name in ("reasons", "values"))
    seconds, inputs = batch["seconds"].to_pylist(), _maps(batch["inputs"])
    columns = (batch["shard"].to_pylist(), batch["rows"].to_pylist(), groups, *maps, seconds, inputs)
    return map(ShardRecord, *columns)


def _maps(column: pa.ListArray) -> Iterator[dict[str, Any]]:
    flat = column.flatten()
    items = zip(map(sys.intern, flat.field(0).to_pylist()), flat.field(1).to_pylist(), strict=True)
    return (dict(islice(items, size)) for size in pc.list_value_length(column).to_pylist())


@dataclass(frozen=True)
class Manifest:
    """A finished stage. values: facts of this stage only, such as encoder, recall or shapes."""

    stage: str
    schema_version: int
    fingerprint: str
    upstream: dict[str, str]
    config: dict[str, Any]
    shards: Sequence[ShardRecord]
    """Kept as a ShardTable."""
    values: dict[str, Any]
    seconds: float
    inputs: dict[str, str] = field(default_factory=dict)
    """As those of its records."""
    code_version: str = VERSION
    hardware: str = field(default_factory=lambda: f"{platform.machine()} {platform.system()}")

    def __post_init__(self) -> None:
        object.__setattr__(self, "shards", ShardTable.of(self.shards))

    @property
    def _shards(self) -> ShardTable:
        return cast(ShardTable, self.shards)

    @property
    def rows(self) -> int:
        """Rows kept in all shards."""
        return pc.sum(self._shards.table["rows"]).as_py() or 0

    @property
    def reasons(self) -> dict[str, int]:
        """Rows left out of all shards by reason, sorted by reason."""
        reasons, counts = self._shards.table["reasons"].combine_chunks().flatten().flatten()
        total = pa.table({"reason": reasons, "rows": counts}).group_by("reason").aggregate([("rows", "sum")])
        return dict(sorted(zip(total["reason"].to_pylist(), total["rows_sum"].to_pylist(), strict=True)))

    @property
    def bytes(self) -> int:
        """Bytes of all files."""
        return pc.sum(self._shards.files.field("bytes")).as_py() or 0

    @property
    def files_fingerprint(self) -> str:
        """The fingerprint when a file last changed. A removal of images can change those of the inputs alone."""
        return str(self.values.get("files_fingerprint", self.fingerprint))

    @property
    def identity(self) -> str:
        """Digest of the output for the fingerprint of later stages: of settings and of all file contents."""
        return _digest([self.fingerprint, sorted(self.checksums().items())])

    def identity_of(self, prefix: str) -> str:
        """Digest of the contents of the shards with a prefix: the identity for stages that read only these."""
        return _digest([[name, digest] for name, digest in self.digests().items() if name.startswith(prefix)])

    def digests(self) -> dict[str, str]:
        """`ShardRecord.digest` of every shard, by name, in order."""
        hashes = iter(self._shards.files.field("sha256").to_pylist())
        sizes = pc.list_value_length(self._shards.table["files"]).to_pylist()
        names = self._shards.table["shard"].to_pylist()
        return {name: _digest(list(islice(hashes, size))) for name, size in zip(names, sizes, strict=True)}

    def shard_names(self, prefix: str = "") -> list[str]:
        """Names of the shards with a prefix such as `train/`, in order."""
        return [name for name in self._shards.table["shard"].to_pylist() if name.startswith(prefix)]

    def checksums(self) -> dict[str, str]:
        """SHA-256 of every file of the stage, by name. Repeated and interrupted runs give the same."""
        files = self._shards.files
        return dict(zip(files.field("name").to_pylist(), files.field("sha256").to_pylist(), strict=True))


def fingerprint(stage: str, schema_version: int, config: Config, upstream: dict[str, str]) -> str:
    """Digest of everything that determines a stage's output. upstream: identities of its input stages."""
    return settings_fingerprint(stage, schema_version, config.output_fields(), upstream)


def settings_fingerprint(stage: str, schema_version: int, settings: dict[str, Any], upstream: dict[str, str]) -> str:
    """As `fingerprint`. settings: `Config.output_fields`."""
    return _digest([stage, schema_version, settings, sorted(upstream.items())])


def _digest(parts: list[Any]) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def read_manifest(root: Root, stage: str) -> Manifest:
    """The manifest of a finished stage. Raises UserError if the stage did not finish."""
    name = f"{stage}/manifest.json" if stage else "manifest.json"
    values = root.find_json(name)
    if values is None:
        command = command_of(stage)
        raise UserError(
            f"{root.at(name)} is missing: {command} did not finish. "
            f"Run 'make {command}' again; finished shards are kept."
        )
    if isinstance(values, dict) and "shards_file" in values:
        file = str(values.pop("shards_file"))
        if not SHARDS_FILE.fullmatch(file):
            raise UserError(f"{root.at(name)} names {file}, no file of records. {damage_advice(root.url, stage)}")
        values["shards"] = _read_shards(root, stage, file)
    try:
        return _manifest(values)
    except (KeyError, TypeError, AttributeError, pa.ArrowException) as error:
        raise UserError(
            f"{root.at(name)} is not a manifest of version {VERSION}: {error}. {damage_advice(root.url, stage)}"
        ) from error


def write_manifest(root: Root, manifest: Manifest, folder: str | None = None) -> None:
    """Write a stage's manifest. Call this after all other files are written. folder: if not that of its stage."""
    folder = manifest.stage if folder is None else folder
    values = {item.name: getattr(manifest, item.name) for item in fields(manifest)}
    shards = cast(ShardTable, values.pop("shards"))
    place = root.child(folder) if folder else root
    current = write_shards(place, "shards", shards.table) if len(shards) > MAX_JSON_SHARDS else ""
    values |= {"shards_file": current} if current else {"shards": list(map(asdict, shards))}
    place.write_json("manifest.json", values)
    place.delete_files(name for name in place.list("shards", ".parquet") if name != current)


def write_shards(root: Root, folder: str, table: pa.Table) -> str:
    """Write records as `<folder>/<digest of the table>.parquet`; returns the name of the file."""
    data = pa.BufferOutputStream()
    pq.write_table(table, data, compression="zstd", row_group_size=1 << 16)
    content = data.getvalue()
    name = f"{folder}/{hashlib.sha256(content).hexdigest()[:16]}.parquet"
    root.write_bytes(name, content)
    return name


def _read_shards(root: Root, stage: str, file: str) -> ShardTable:
    """The records in a file of `write_shards`. Raises UserError if the file has other columns or is damaged."""
    name = f"{stage}/{file}".lstrip("/")
    with root.open(name) as stream:
        content = stream.read()
    try:
        table = pq.read_table(pa.BufferReader(content))
        return ShardTable(table.select(RECORD.names).cast(RECORD))
    except (pa.ArrowException, KeyError) as error:
        raise UserError(
            f"{root.at(name)} has no records of shards: {error}. {damage_advice(root.url, stage)}"
        ) from error


def record_file(stage: str, shard: str) -> str:
    """The name of the record of a shard."""
    return f"{stage}/records/{shard}.json"


def read_record(root: Root, stage: str, shard: str) -> tuple[str, ShardRecord] | None:
    """The fingerprint and record of a finished shard, or None if it has no record."""
    values = root.find_json(record_file(stage, shard))
    return None if values is None else (values.pop("fingerprint"), _record(values))


def write_record(root: Root, stage: str, stage_fingerprint: str, record: ShardRecord) -> None:
    """Record a finished shard, with the fingerprint of its stage.

    Files that only its earlier record names are deleted afterwards.
    """
    earlier = read_record(root, stage, record.shard)
    root.write_json(record_file(stage, record.shard), {"fingerprint": stage_fingerprint, **asdict(record)})
    if earlier and earlier[0] == stage_fingerprint:
        for name in sorted({file.name for file in earlier[1].files} - {file.name for file in record.files}):
            root.delete(name)


def shard_file(root: Root, stage: str, shard: str, suffix: str) -> str:
    """The name of a file of a finished shard: from its record, or without one the name that new shards have."""
    stored = read_record(root, stage, shard)
    return stored[1].file(suffix) if stored else f"{stage}/{shard}{suffix}"


def delete_record(root: Root, stage: str, shard: str) -> None:
    """Delete the record of a shard. Call this before its files change."""
    root.delete(record_file(stage, shard))


def files_exist(root: Root, record: ShardRecord) -> bool:
    """Whether every file of a record exists with its recorded size."""
    return all(root.size(file.name) == file.bytes for file in record.files)


def _record(values: dict[str, Any]) -> ShardRecord:
    files = tuple(FileRecord(**file) for file in values.pop("files"))
    return ShardRecord(files=files, **values)


def _manifest(values: dict[str, Any]) -> Manifest:
    stored = values.pop("shards")
    shards = stored if isinstance(stored, ShardTable) else [_record(shard) for shard in stored]
    return Manifest(shards=shards, **values)
