"""The identity and the folder of a stage: is it finished, start or resume it, write its manifest.

Reads and writes `<stage>/started.json` and `<stage>/manifest.json`; does not use Ray.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from retrieval.config import Config
from retrieval.index.hidden import KEPT_BY_BUILDS
from retrieval.storage.lease import lease, raise_if_lost
from retrieval.storage.manifest import Manifest, ShardRecord, files_exist, read_manifest, write_manifest
from retrieval.storage.root import Root
from retrieval.storage.stage_folder import StageIdentity, prepare_folder

THREADS = 32
"""Concurrent requests to an object store: each takes some hundredths of a second."""

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Stage:
    """A stage: its folder below the root, format version, settings, and the identity of each input by its name.

    upstream: inputs in the fingerprint. inputs: other inputs; if they change, finished shards are updated.
    """

    root: Root
    name: str
    schema_version: int
    config: Config
    upstream: dict[str, str] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)

    @property
    def identity(self) -> StageIdentity:
        """What determines the stage's output."""
        return StageIdentity.of(self.name, self.schema_version, self.config, self.upstream)

    @property
    def fingerprint(self) -> str:
        """See `retrieval.storage.manifest.fingerprint`."""
        return self.identity.fingerprint

    @property
    def log(self) -> logging.Logger:
        """The logger of the stage."""
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
        if not all(map_in_threads(partial(files_exist, self.root), manifest.shards)):
            self.log.warning("files of %s are missing or truncated: they are made again", self.root.at(self.name))
            return None
        return manifest

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
        # Hidden images stay hidden in the new output.
        prepare_folder(self.root, self.name, self.identity, kept=KEPT_BY_BUILDS)

    def complete(self, records: Sequence[ShardRecord], values: dict[str, Any], started: float) -> Manifest:
        """Write the manifest under the lease, last of all files. started: `time.time()` at the start of the stage."""
        raise_if_lost()
        # Workers of a killed run may have written partial files after begin() deleted the others.
        self.root.delete_partial_files(self.name)
        manifest = Manifest(
            stage=self.name,
            schema_version=self.schema_version,
            fingerprint=self.fingerprint,
            upstream=self.upstream,
            config=self.config.model_dump(mode="json"),
            shards=tuple(records),
            values=values,
            seconds=round(time.time() - started, 3),
            inputs=self.inputs,
        )
        write_manifest(self.root, manifest)
        kept, dropped = f"{manifest.rows:,}", f"{sum(manifest.reasons.values()):,}"
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in manifest.reasons.items()) or "no reasons"
        self.log.info("finished: %s rows kept, %s not (%s) in %.1f s", kept, dropped, reasons, manifest.seconds)
        return manifest


def map_in_threads(function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """The results of `function` for each item, in order, from many threads. Raises its first exception."""
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(function, items))


def group_shards(shards: Sequence[ShardRecord], max_rows: int) -> list[list[str]]:
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
