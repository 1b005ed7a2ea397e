"""A database as other processes leave it, for servers: it is opened again when they update it or hide images in it."""

import hashlib
import time
from contextlib import suppress
from threading import Lock

from retrieval.database.database import Database
from retrieval.errors import NodeError
from retrieval.index.hidden import HIDDEN_FOLDER, hidden_ids
from retrieval.storage.manifest import read_manifest

LOOK_EVERY_S = 3.0
"""Seconds between two looks at the manifest and at the names of the hidden lists."""


class CurrentDatabase:
    """An opened database and its newest state. Thread-safe; it may read files, so call it outside of event loops."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._manifest = b""
        """Digest of the manifest at the last look."""
        self._hidden_files: list[str] = []
        self._next_look = time.monotonic()
        self._lock = Lock()

    def get(self) -> Database:
        """The database, at most LOOK_EVERY_S older than its files. The same object as before if nothing changed.

        While a build replaces it, the earlier one with the images hidden that are hidden now. Raises UserError if its
        files are damaged, or belong to another encoder.
        """
        with self._lock:
            if time.monotonic() >= self._next_look:
                with suppress(NodeError):  # the store does not respond: the state of the last look stays
                    self._look()
                self._next_look = time.monotonic() + LOOK_EVERY_S
            return self._database

    def _look(self) -> None:
        root, content = self._database.root, self._database.root.read_bytes("manifest.json")
        digest = self._manifest if content is None else hashlib.sha256(content).digest()
        hidden_files = root.list(HIDDEN_FOLDER, ".npy")
        # Opening a large database takes long, so it is not opened again at the first look.
        if digest != self._manifest and read_manifest(root, "") != self._database.manifest:
            newest = Database.open(*self._database.source)
            newest.require_encoder(self._database.encoder)
            self._database = newest
        if hidden_files != self._hidden_files and len(ids := hidden_ids(root)) > len(self._database.hidden):
            self._database = self._database.without(ids)
        self._manifest, self._hidden_files = digest, hidden_files
