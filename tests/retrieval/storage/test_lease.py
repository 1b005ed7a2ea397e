"""Leases of folders on a local disk and in a bucket: one holder, takeover from ended and silent ones."""

import itertools
import json
import os
import re
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.crashes.store import Store
from retrieval import Root, UserError
from retrieval.storage import lease as module
from retrieval.storage.lease import lease, raise_if_lost, this_process

FILE = "leases/embed.json"


@pytest.fixture(params=["local", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Root:
    if request.param == "local":
        return Root(tmp_path)
    store: Store = request.getfixturevalue("object_store")
    return Root(store.url(request.node.originalname))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in {"HEARTBEAT_S": 0.05, "EXPIRE_S": 0.6, "SETTLE_S": 0.05, "POLL_S": 0.02}.items():
        monkeypatch.setattr(module, name, seconds)


def write_lease(root: Root, renewals: int = 0, /, **owner: Any) -> None:
    """A lease of a process that differs from this one in the given fields."""
    values = vars(replace(this_process(), **owner))
    since = "2026-01-02T03:04:05+00:00"
    root.write_json(FILE, {"owner": values, "since": since, "token": "other", "renewals": renewals})


def test_a_second_holder_is_told_who_holds_the_lease_and_since_when(root: Root) -> None:
    with lease(root, "embed"):
        since = re.escape(root.read_json(FILE)["since"])
        told = rf"embed: process {os.getpid()} on .* has worked on it since {since}"
        with pytest.raises(UserError, match=told), lease(root, "embed"):
            pass
        with lease(root, "index"):
            pass
    with lease(root, "embed"):
        pass
    assert root.list("leases") == []


def test_without_proc_a_lease_is_held_while_it_is_renewed_and_taken_over_when_it_expires(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Root(tmp_path)
    monkeypatch.setattr(module, "PROC", tmp_path / "absent")  # as on macOS
    with monkeypatch.context() as patch:
        patch.setattr(module, "EXPIRE_S", 600.0)
        with lease(root, "embed"), pytest.raises(UserError, match="has worked on it since"), lease(root, "embed"):
            pass
    write_lease(root)
    with lease(root, "embed"):
        assert root.read_json(FILE)["token"] != "other"


def test_the_lease_of_a_process_that_ended_here_is_taken_over_at_once(
    root: Root, caplog: pytest.LogCaptureFixture
) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for owner in ({"pid": dead.pid}, {"process_start": 1}):  # gone; its id belongs to another process now
        write_lease(root, **owner)
        with lease(root, "embed"):
            assert root.read_json(FILE)["token"] != "other"
    assert caplog.text.count("has ended") == 2
    assert "waiting" not in caplog.text


@pytest.mark.parametrize("field", ["host", "boot", "pid_namespace"])
def test_the_lease_of_a_silent_process_elsewhere_is_taken_over_after_it_expired(tmp_path: Path, field: str) -> None:
    root = Root(tmp_path)
    write_lease(root, 0, **{"pid": -1, field: "elsewhere"})
    started = time.monotonic()
    with lease(root, "embed"):
        assert time.monotonic() - started >= module.EXPIRE_S


def test_a_process_elsewhere_that_renews_its_lease_keeps_it(root: Root, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EXPIRE_S", 600.0)
    write_lease(root, host="elsewhere", pid=7)
    ended = threading.Event()

    def renew() -> None:
        for renewals in itertools.count(1):
            write_lease(root, renewals, host="elsewhere", pid=7)
            if ended.wait(0.1):
                return

    renewing = threading.Thread(target=renew)
    renewing.start()
    told = "process 7 on elsewhere has worked on it since 2026-01-02T03:04:05"
    with pytest.raises(UserError, match=told), lease(root, "embed"):
        pass
    ended.set()
    renewing.join()


def test_a_lease_is_renewed_while_it_is_held(root: Root) -> None:
    with lease(root, "embed"):
        while json.loads(root.read_bytes(FILE) or b"{}").get("renewals", 0) < 2:
            time.sleep(0.02)


def test_a_lease_that_is_taken_while_another_process_waits_for_its_end_can_be_half_written(tmp_path: Path) -> None:
    root = Root(tmp_path)
    write_lease(root, host="elsewhere", pid=7)
    threading.Timer(0.1, root.write_bytes, (FILE, b'{"owner"')).start()
    with lease(root, "embed"):
        pass


def test_a_half_written_lease_expires(tmp_path: Path) -> None:
    Root(tmp_path).write_bytes(FILE, b'{"owner"')
    with lease(Root(tmp_path), "embed"):
        pass


def test_of_many_processes_that_find_the_same_ended_holder_one_gets_the_lease(
    root: Root, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_lease(root, process_start=1)
    results: list[str] = []
    settling: set[int] = set()
    changed, start = threading.Condition(), threading.Barrier(6)

    def sleep(seconds: float) -> None:
        """The pause SETTLE_S is long enough: every other process has written its lease or was refused."""
        if seconds != module.SETTLE_S:
            time.sleep(seconds)
            return
        with changed:
            settling.add(threading.get_ident())
            changed.notify_all()
            changed.wait_for(lambda: len(settling) + results.count("refused") == 6, timeout=300)

    def take() -> None:
        start.wait()
        try:
            with lease(root, "embed"), changed:
                results.append("held")
                changed.notify_all()
                changed.wait_for(lambda: len(results) == 6, timeout=300)
        except UserError:
            with changed:
                settling.discard(threading.get_ident())
                results.append("refused")
                changed.notify_all()

    monkeypatch.setattr(module, "time", SimpleNamespace(sleep=sleep))
    monkeypatch.setattr(module, "SETTLE_S", 1.0)
    threads = [threading.Thread(target=take) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == ["held", *["refused"] * 5]


def test_a_process_that_lost_its_lease_is_told_and_leaves_the_lease_of_the_other(tmp_path: Path) -> None:
    root = Root(tmp_path)
    with lease(root, "embed"):
        raise_if_lost()
        while not module._lost:
            write_lease(root, host="elsewhere")  # again: a renewal at this moment may replace it
            time.sleep(0.02)
        with pytest.raises(UserError, match="embed was taken over by another process"):
            raise_if_lost()
    assert root.read_json(FILE)["token"] == "other"
    raise_if_lost()  # a later stage of this process is not concerned
