"""The folder of a stage has one driver at a time."""

import json
import os
from pathlib import Path

import pytest

from pipeline.runtime.stage import Stage
from retrieval.config import Config
from retrieval.errors import UserError
from retrieval.storage import lease
from retrieval.storage.manifest import Manifest, ShardRecord
from retrieval.storage.root import Root


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(Root(tmp_path), "letters", 1, Config())


def test_a_second_driver_is_refused_and_leaves_the_unfinished_files_of_the_first(stage: Stage) -> None:
    with stage.building(), stage.root.writing("letters/a") as pending:
        pending.path.write_bytes(b"half")
        told = f"letters: process {os.getpid()} on .* has worked on it since"
        with pytest.raises(UserError, match=told), stage.building():
            pass
        assert pending.path.read_bytes() == b"half"
    assert stage.root.read_bytes("letters/a") == b"half"
    with stage.building():
        pass


def test_a_driver_that_failed_releases_its_stage(stage: Stage) -> None:
    with pytest.raises(ZeroDivisionError), stage.building():
        raise ZeroDivisionError
    with stage.building():
        pass


def test_a_driver_that_lost_its_lease_does_not_finish_the_stage(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "_lost", set())
    with stage.building(), pytest.raises(UserError, match="letters was taken over by another process"):
        file = stage.root.local_path("leases/letters.json")
        other = json.loads(file.read_text()) | {"token": "other"}
        file.write_text(json.dumps(other))
        lease._lost.add(stage.root.at("letters"))  # as its heartbeat does
        stage.complete([ShardRecord("a", 1, ())], {}, 0.0)
    assert not stage.root.exists("letters/manifest.json")
    assert stage.root.exists("leases/letters.json")


def test_the_drivers_of_two_stages_do_not_wait_for_each_other(stage: Stage) -> None:
    with stage.building(), Stage(stage.root, "other", 1, Config()).building():
        manifest: Manifest = stage.complete([ShardRecord("a", 1, ())], {}, 0.0)
    assert stage.finished() == manifest
