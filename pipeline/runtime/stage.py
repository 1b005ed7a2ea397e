"""A stage's identity and its folder: what was finished, what is begun, and the manifest at the end.

Reads and writes `<stage>/started.json` and `<stage>/manifest.json`; knows nothing of Ray.
"""

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from retrieval.config import Config
from retrieval.index.hidden import FILE as BLOCKED
from retrieval.storage.manifest import (
    Manifest,
    ShardRecord,
    files_stand,
    fingerprint,
    read_manifest,
    write_manifest,
)
from retrieval.storage.root import Root

ASKED_AT_ONCE = 32
"""Shards that an object store is asked about at once: each answer takes some hundredths of a second."""

Asked = TypeVar("Asked")
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Stage:
    """A stage's identity: its folder below the root, format, settings and what it is made from."""

    root: Root
    name: str
    schema_version: int
    config: Config
    upstream: dict[str, str] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """See `retrieval.storage.manifest.fingerprint`."""
        return fingerprint(self.name, self.schema_version, self.config, self.upstream)

    @property
    def log(self) -> logging.Logger:
        """The logger that bears the stage's name."""
        return logging.getLogger(self.name)

    def finished(self) -> Manifest | None:
        """The manifest, if this very stage was finished before; otherwise None."""
        if not self.root.exists(f"{self.name}/manifest.json"):
            return None
        manifest = read_manifest(self.root, self.name)
        if manifest.fingerprint != self.fingerprint:
            return None
        if not all(at_once(partial(files_stand, self.root), manifest.shards)):
            self.log.warning(
                "files of %s are missing or cut short: they are made again", self.root.at(self.name)
            )
            return None
        self.log.info("already finished: %s rows in %d shards", f"{manifest.rows:,}", len(manifest.shards))
        return manifest

    def begin(self) -> None:
        """Make the folder ready: what another fingerprint left is deleted, its manifest first."""
        mark = f"{self.name}/started.json"
        self.root.delete(f"{self.name}/manifest.json")
        if self.root.exists(mark) and self.root.read_json(mark) == {"fingerprint": self.fingerprint}:
            self.root.sweep_partials(self.name)
            return
        if self.root.exists(self.name):
            self.log.info("settings or inputs changed: %s is made anew", self.root.at(self.name))
        self.root.delete_but(self.name, BLOCKED)  # what must not be shown stays hidden in what comes instead
        self.root.write_json(mark, {"fingerprint": self.fingerprint})

    def complete(self, records: Sequence[ShardRecord], values: dict[str, Any], started: float) -> Manifest:
        """Write the manifest, last of all files. started: `time.time()` when the stage began."""
        # Workers of a killed run may have outlived the sweep at the beginning.
        self.root.sweep_partials(self.name)
        manifest = Manifest(
            stage=self.name,
            schema_version=self.schema_version,
            fingerprint=self.fingerprint,
            upstream=self.upstream,
            config=self.config.model_dump(mode="json"),
            shards=tuple(records),
            values=values,
            seconds=round(time.time() - started, 3),
        )
        write_manifest(self.root, manifest)
        self.log.info(
            "finished: %s rows kept, %s not (%s) in %.1f s",
            f"{manifest.rows:,}",
            f"{sum(manifest.reasons.values()):,}",
            ", ".join(f"{word} {count:,}" for word, count in manifest.reasons.items()) or "no reasons",
            manifest.seconds,
        )
        return manifest


def at_once(ask: Callable[[Asked], Answer], about: Sequence[Asked]) -> list[Answer]:
    """What `ask` gives for each, many threads at a time, in order. Raises the first exception of it."""
    with ThreadPoolExecutor(ASKED_AT_ONCE) as pool:
        return list(pool.map(ask, about))
