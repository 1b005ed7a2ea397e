"""The identity and the folder of a stage: is it finished, start or resume it, write its manifest.

Reads and writes `<stage>/started.json` and `<stage>/manifest.json`; does not use Ray.
"""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from retrieval.config import Config
from retrieval.errors import UserError
from retrieval.index.hidden import KEPT_BY_BUILDS
from retrieval.storage.lease import lease, raise_if_lost
from retrieval.storage.manifest import (
    BATCH_ROWS,
    Manifest,
    ShardRecord,
    ShardTable,
    read_manifest,
    record_file,
    write_manifest,
)
from retrieval.storage.root import Root
from retrieval.storage.stage_folder import StageIdentity, listing_splits, prepare_folder

THREADS = 32
"""Concurrent requests to an object store: each takes some hundredths of a second."""
FREE_HOURS, FREE_SHARE = 1.0, 0.1
"""Hours of one worker, and share of the finished shards, that are made again without `--remake` (`Stage.discard`)."""

VERSIONS = pa.schema({"name": pa.string(), "version": pa.string()})
FILES_AT_ONCE = 20_000

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Stage:
    """A stage: its folder below the root, format version, settings, and the identity of each input by its name.

    upstream: inputs in the fingerprint. inputs: other inputs of every shard.
    by_shard: by shard, the digests of what it is made from. Inputs of `upstream` with these names are compared shard by
    shard: if one changes, only the shards with another digest are made again.
    set_aside: receives the records of finished shards of other inputs before these are deleted. Their files stay, so
    that the work can update them.
    kept: beginnings of further names in the folder that stay if the stage is made again.
    """

    root: Root
    name: str
    schema_version: int
    config: Config
    upstream: dict[str, str] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)
    by_shard: Mapping[str, dict[str, str]] = field(default_factory=dict)
    set_aside: Callable[[Sequence[ShardRecord]], None] | None = None
    kept: tuple[str, ...] = ()

    @cached_property
    def identity(self) -> StageIdentity:
        """What determines the stage's output."""
        names = {name for digests in self.by_shard.values() for name in digests}
        return StageIdentity.of(self.name, self.schema_version, self.config, self.upstream, names)

    @property
    def fingerprint(self) -> str:
        """See `retrieval.storage.manifest.fingerprint`."""
        return self.identity.fingerprint

    def inputs_of(self, shard: str) -> dict[str, str]:
        """Digests of what a shard is made from, outside the fingerprint of its record."""
        return self.inputs | self.by_shard.get(shard, {})

    @property
    def log(self) -> logging.Logger:
        return logging.getLogger(self.name)

    def finished(self) -> Manifest | None:
        """As `stored`, but only if the inputs are these too."""
        manifest = self.stored()
        if manifest is None or manifest.inputs != self.inputs:
            return None
        self.log.info("already finished: %s rows in %d shards", f"{manifest.rows:,}", len(manifest.shards))
        return manifest

    def stored(self) -> Manifest | None:
        """The manifest if the stage is finished with this fingerprint and any inputs and its files exist, else None."""
        if not self.root.exists(f"{self.name}/manifest.json"):
            return None
        manifest = read_manifest(self.root, self.name)
        if manifest.fingerprint != self.fingerprint:
            return None
        shards = ShardTable.of(manifest.shards)
        if pc.all(self.files(manifest.shard_names()).have_all(shards)).as_py() is False:
            self.log.warning("files of %s are missing or truncated: they are made again", self.root.at(self.name))
            return None
        return manifest

    def files(self, shards: Sequence[str]) -> "StageFiles":
        """The files below the folder of the stage, from one listing. shards: those of the stage, as far as known."""
        return StageFiles(self.root, self.name, shards)

    @contextmanager
    def building(self) -> Iterator[None]:
        """Hold the lease of the stage until the block ends, and `begin` it.

        Raises UserError if another process works on this stage.
        """
        with lease(self.root, self.name):
            self.begin()
            yield

    @contextmanager
    def updating(self) -> Iterator[None]:
        """Hold the lease of a finished stage until the block ends. Its output stays valid until `complete`."""
        with lease(self.root, self.name):
            yield

    def begin(self) -> None:
        """Prepare the folder under the lease, see `prepare_folder`.

        Raises UserError for finished shards of another fingerprint.
        """
        kept = (*KEPT_BY_BUILDS, *self.kept)  # hidden images stay hidden in the new output
        prepare_folder(self.root, self.name, self.identity, kept, keep_manifest=bool(self.by_shard))

    def discard(self, outdated: Sequence[ShardRecord], num_finished: int) -> None:
        """Delete the manifest, and the records of finished shards that are made from other inputs than now.

        outdated: these shards, and those that the stage no longer has; num_finished: all finished shards. The log
        states the loss. Raises UserError, before anything is deleted, if the loss is more than FREE_HOURS and
        FREE_SHARE of the finished shards, unless `root.remake` permits it.
        """
        if outdated:
            text = self._loss(outdated, num_finished)
            hours = sum(record.seconds for record in outdated) / 3600
            if hours > FREE_HOURS and len(outdated) > FREE_SHARE * num_finished and not self.root.remake:
                raise UserError(
                    f"{text} They are kept: nothing was done. To make them again, repeat the command with --remake"
                    " (make: ARGS=--remake). To keep them, undo the change."
                )
            self.log.warning("%s", text)
        self.root.delete(f"{self.name}/manifest.json")
        if self.set_aside:
            self.set_aside(outdated)
        else:
            former = [record for record in outdated if record.shard not in self.by_shard]
            # A record without its files is not used, but files without a record would stay.
            self.root.delete_files(file.name for record in former for file in record.files)
        self.root.delete_files(record_file(self.name, record.shard) for record in outdated)

    def _loss(self, outdated: Sequence[ShardRecord], num_finished: int) -> str:
        inputs = (self.inputs_of(record.shard).items() ^ record.inputs.items() for record in outdated)
        names = sorted({name for changed in inputs for name, _ in changed} - {*self.inputs})
        fate = "brought up to date" if self.set_aside else "made again or deleted"
        rows, seconds = (sum(amounts) for amounts in zip(*((r.rows, r.seconds) for r in outdated), strict=True))
        size = sum(file.bytes for record in outdated for file in record.files)
        return (
            f"{self.root.at(self.name)}: {len(outdated):,} of {num_finished:,} finished shards are to be {fate},"
            f" because of another {' and '.join(names)}: {rows:,} rows, {size / 1e6:,.1f} MB,"
            f" {seconds / 3600:,.2f} hours of one worker."
        )

    def complete(self, records: Sequence[ShardRecord], values: dict[str, Any], started: float) -> Manifest:
        """Write the manifest under the lease, last of all files. started: `time.time()` at the start of the stage."""
        raise_if_lost()
        # Workers of a killed run may have written partial files after begin() deleted the others.
        self.root.delete_partial_files(self.name)
        if self.by_shard:
            self._delete_unnamed(records)
        manifest = Manifest(
            stage=self.name,
            schema_version=self.schema_version,
            fingerprint=self.fingerprint,
            upstream=self.upstream,
            config=self.config.model_dump(mode="json"),
            shards=records,
            values=values,
            seconds=round(time.time() - started, 3),
            inputs=self.inputs,
        )
        write_manifest(self.root, manifest)
        kept, dropped = f"{manifest.rows:,}", f"{sum(manifest.reasons.values()):,}"
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in manifest.reasons.items()) or "no reasons"
        self.log.info("finished: %s rows kept, %s not (%s) in %.1f s", kept, dropped, reasons, manifest.seconds)
        return manifest

    def _delete_unnamed(self, records: Sequence[ShardRecord]) -> None:
        """Delete files of shards that no record names, and the records of former shards. Other files stay."""
        folder = f"{self.name}/records/"
        shards = {record.shard for record in records}
        named = {file.name for record in records for file in record.files}
        named |= {record_file(self.name, shard) for shard in shards}
        files = self.root.files(self.name, listing_splits(self.name, shards))
        unnamed = [file.name for file in files if file.name not in named]
        shards |= {name.removeprefix(folder).removesuffix(".json") for name in unnamed if name.startswith(folder)}
        of_shards = (name.removeprefix(folder).removeprefix(f"{self.name}/").partition(".")[0] for name in unnamed)
        self.root.delete_files(name for name, shard in zip(unnamed, of_shards, strict=True) if shard in shards)


class StageFiles:
    """The files below the folder of a stage, in 8 bytes of memory each, and names and versions of records and journal.

    shards: those of the stage, as far as known.
    """

    def __init__(self, root: Root, folder: str, shards: Iterable[str]) -> None:
        own = f"{folder}/records/", f"{folder}/journal/"
        files = root.files(folder, listing_splits(folder, shards))
        hashes, parts = [np.empty(0, np.int64)], [VERSIONS.empty_table()]
        while part := list(islice(files, FILES_AT_ONCE)):
            hashes.append(_hashes((file.name, file.bytes) for file in part))
            versions = [(file.name, file.version) for file in part if file.name.startswith(own)]
            parts.append(pa.table([*map(pa.array, zip(*versions, strict=True))], VERSIONS) if versions else parts[0])
        self._hashes = np.concatenate(hashes)
        self._names, self._versions = pa.concat_tables(parts).columns

    def names_in(self, start: str) -> list[str]:
        """Names of records or of the journal that begin with `start`."""
        return list(self._names.filter(pc.starts_with(self._names, start)).to_pylist())

    def versions_of(self, records: pa.Array) -> pa.Array:
        """The versions of record files, "" on a local disk; null for those that do not exist."""
        return self._versions.take(pc.index_in(records, value_set=self._names)).combine_chunks()

    def have_all(self, records: ShardTable) -> pa.BooleanArray:
        """Which records have all their files, with the recorded sizes."""
        counts = pc.list_value_length(records.table["files"]).to_numpy()
        # A missing file goes unnoticed if another has its hash: once in 10^13.
        is_there = np.isin(_hashes(_sizes(records)), self._hashes)
        has_all = np.ones(len(records), bool)
        has_all[np.repeat(np.arange(len(records)), counts)[~is_there]] = False
        return pa.array(has_all)


def _sizes(records: ShardTable) -> Iterator[tuple[str, int]]:
    """The name and the bytes of each file."""
    for batch in records.table.to_batches(BATCH_ROWS):
        files = batch["files"].flatten()
        yield from zip(files.field("name").to_pylist(), files.field("bytes").to_pylist(), strict=True)


def _hashes(values: Iterable[tuple[str, int]]) -> npt.NDArray[np.int64]:
    return np.fromiter(map(hash, values), np.int64)


def map_in_threads(function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """The results of `function` for each item, in order, from many threads. Raises its first exception."""
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(function, items))


def group_shards(shards: Iterable[ShardRecord], max_rows: int) -> list[list[str]]:
    """Group the names of consecutive shards: at most max_rows rows in a group, or a single shard."""
    groups: list[list[str]] = []
    rows = 0
    for record in shards:
        if not groups or rows + record.rows > max_rows:
            groups.append([])
            rows = 0
        groups[-1].append(record.shard)
        rows += record.rows
    return groups
