"""Leases: only one process at a time works on a folder of a root.

Reads and writes `leases/<name>.json`: the owner, since when, and a number that the owner raises every HEARTBEAT_S.
A holder on this machine is checked by its process in /proc. A holder elsewhere, and any holder on a system without
/proc such as macOS, is alive if it renews its lease within EXPIRE_S. The observer counts this time in pauses of POLL_S:
clocks of two machines are never compared, and a time in which the observer stood still does not count.

An erasure of images refuses builds and updates of a database also after its process was killed (`erasure.json`).
"""

import fcntl
import json
import logging
import math
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from retrieval.errors import UserError
from retrieval.storage.full_disk import write_errors_named
from retrieval.storage.root import Root

FOLDER = "leases"
HEARTBEAT_S = 10.0
EXPIRE_S = 60.0
"""A lease that was not renewed for so long is taken over."""
ERASURE_FILE = "erasure.json"
"""Names the erasure (`optout --erase`) that has begun and not ended in a database. It outlives a killed erasure."""
SETTLE_S = 1.0
"""Pause before a new lease is read back: not every store refuses to create a file that exists already."""
POLL_S = 2.0
PROC = Path("/proc")

log = logging.getLogger("lease")


@dataclass(frozen=True)
class Owner:
    """A process. process_start: clock ticks from the boot of its machine, because process ids are used again."""

    host: str
    boot: str
    pid_namespace: str
    pid: int
    process_start: int

    def is_visible(self) -> bool:
        """Whether this process can see that one: same machine, boot and namespace of process ids, and /proc exists."""
        here = this_process()
        same = (self.host, self.boot, self.pid_namespace) == (here.host, here.boot, here.pid_namespace)
        return same and bool(here.boot)

    def has_ended(self) -> bool:
        """Whether a visible process has ended."""
        return _process_start(self.pid) != self.process_start


def this_process() -> Owner:
    """The identity of this process. Without /proc, boot and namespace are empty."""
    if not (PROC / "self").exists():
        return Owner(socket.gethostname(), "", "", os.getpid(), 0)
    boot = (PROC / "sys/kernel/random/boot_id").read_text().strip()
    namespace = os.readlink(PROC / "self/ns/pid")
    return Owner(socket.gethostname(), boot, namespace, os.getpid(), _process_start(os.getpid()))


def _process_start(pid: int) -> int:
    """Start of a running process in clock ticks; -1 if there is no such process or it is a zombie."""
    try:
        # The second field is the command in parentheses and may contain spaces.
        state, *fields = (PROC / f"{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return -1
    return -1 if state == "Z" else int(fields[18])


_lost: set[str] = set()
"""Folders of the leases in use that another process took from this one."""


def raise_if_lost() -> None:
    """Raise UserError if another process has taken over a lease of this one, which was silent for too long."""
    if _lost:
        raise UserError(
            f"{min(_lost)} was taken over by another process, because this one did not renew it for {EXPIRE_S:g} s. "
            "The other process goes on with the same files; finished shards are kept."
        )


def lease_token(root: Root, name: str) -> str:
    """The token of the lease of a folder, which differs for each holder; empty if nobody holds it."""
    return str((root.find_json(_file(name)) or {}).get("token", ""))


def _file(name: str) -> str:
    return f"{FOLDER}/{name}.json"


@contextmanager
def lease(root: Root, name: str) -> Iterator[None]:
    """Hold the lease of a folder of a root until the block ends. Raises UserError if another process holds it.

    The lease of an ended process is taken over: at once on the same machine, else after EXPIRE_S.
    """
    held = _Lease(root, name)
    while not held.take():
        pass
    thread = threading.Thread(target=held.renew, daemon=True)
    thread.start()
    try:
        yield
    finally:
        held.released.set()
        thread.join()
        held.release()
        _lost.discard(held.folder)


class _Lease:
    """The lease of one folder, held by this process after `take` returned True."""

    def __init__(self, root: Root, name: str) -> None:
        self.root = root
        self.folder = root.at(name)
        self.file = _file(name)
        self.released = threading.Event()
        since = datetime.now(UTC).isoformat(timespec="seconds")
        self.values: dict[str, Any] = {
            "owner": vars(this_process()),
            "since": since,
            "token": uuid.uuid4().hex,
            "renewals": 0,
        }

    def take(self) -> bool:
        """Take the lease if it is free. False: it changed meanwhile. Raises UserError if a process holds it."""
        current = self._read()
        if current is not None:
            self._wait_for_end(current)
        with self._exclusive():
            if self._read() != current:
                return False
            if current is not None:
                self.root.delete(self.file)
            if not self.root.create(self.file, json.dumps(self.values).encode()):
                return False
        if current is not None or not self.root.is_local:
            time.sleep(SETTLE_S)
        return self._is_mine()

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        """Exclude other processes, on a local disk with locks: else one could delete the new lease of another."""
        if not self.root.is_local:
            yield
            return
        folder = self.root.local_path(self.file).parent
        with write_errors_named(folder):
            folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            with suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def renew(self) -> None:
        """Renew the lease until it is released or lost."""
        while not self.released.wait(HEARTBEAT_S):
            try:
                if not self._is_mine():
                    _lost.add(self.folder)
                    log.error("another process took over %s", self.folder)
                    return
                self.values["renewals"] += 1
                self.root.write_json(self.file, self.values)
            except (UserError, OSError) as error:
                log.warning("cannot renew the lease of %s: %s", self.folder, error)

    def release(self) -> None:
        """Delete the lease."""
        with suppress(UserError, OSError):  # it expires
            if self._is_mine():
                self.root.delete(self.file)

    def _is_mine(self) -> bool:
        return (self._read() or {}).get("token") == self.values["token"]

    def _read(self) -> dict[str, Any] | None:
        """The stored lease: None without one, empty while it is being written."""
        data = self.root.read_bytes(self.file)
        try:
            return None if data is None else dict(json.loads(data))
        except (ValueError, TypeError):
            return {}

    def _wait_for_end(self, current: dict[str, Any]) -> None:
        """Return when the holder of a lease has ended or released it. Raises UserError if it is alive."""
        owner = Owner(**current["owner"]) if current else None
        if owner and owner.is_visible():
            if not owner.has_ended():
                raise self._held(current)
            log.warning("%s: process %d, which held its lease, has ended", self.folder, owner.pid)
            return
        holder = f"a process on {owner.host}" if owner else "another process"
        log.warning("%s: waiting up to %g s to see whether %s still works on it", self.folder, EXPIRE_S, holder)
        for _ in range(math.ceil(EXPIRE_S / POLL_S)):
            time.sleep(POLL_S)
            latest = self._read()
            if latest is None:
                return
            if latest and latest != current:
                raise self._held(latest)
        log.warning("%s: its lease has expired", self.folder)

    def _held(self, current: dict[str, Any]) -> UserError:
        owner = Owner(**current["owner"])
        return UserError(
            f"{self.folder}: process {owner.pid} on {owner.host} has worked on it since {current['since']}. Only one "
            "process at a time may write there: wait for it, or end it and run this again."
        )


def start_erasure(root: Root, name: str, plan: str) -> None:
    """Refuse updates of the database at a root from now on, until `end_erasure`, also if this process is killed.

    name: of the erasure: a repeated call of a killed one goes on at once. plan: path of its plan. Raises UserError
    while an update or another erasure works on the database.
    """
    if _erasure_name(root) == name:
        return
    with lease(root, "update"):
        refuse_erasure(root)
        root.write_json(ERASURE_FILE, {"name": name, "plan": plan})


def end_erasure(root: Root, name: str) -> None:
    """Permit updates of the database at a root again, if the erasure of this name refuses them."""
    if _erasure_name(root) == name:
        root.delete(ERASURE_FILE)


def _erasure_name(root: Root) -> str:
    return str((root.find_json(ERASURE_FILE) or {}).get("name", ""))


def refuse_erasure(root: Root) -> None:
    """Raises UserError if an erasure has begun and not ended in the database at a root."""
    if erasure := root.find_json(ERASURE_FILE):
        raise UserError(
            f"{root.url}: 'optout --erase' with the list {erasure['name']} has not ended there. Wait for it, or if it"
            f" was interrupted, run it again with that list; then repeat this. To give it up, delete {erasure['plan']}"
            f" and {root.at(ERASURE_FILE)}: its images stay hidden, but not all are erased."
        )
