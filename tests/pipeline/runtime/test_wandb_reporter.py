import time
from pathlib import Path

import pytest
import wandb

from pipeline.runtime.stage import Stage
from pipeline.runtime.wandb_reporter import wandb_reporter
from retrieval.config import WorkersConfig
from retrieval.errors import UserError
from retrieval.storage.manifest import ShardRecord
from retrieval.storage.root import Root

RECORD = ShardRecord("train/00000", 90, (), {"timeout": 10}, seconds=3.0)


def stage(folder: Path, project: str) -> Stage:
    return Stage(Root(str(folder)), "databases/ink", 1, WorkersConfig(wandb=project))


@pytest.fixture(autouse=True)
def _offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")


def test_a_stage_logs_one_point_a_shard_to_one_run(tmp_path: Path) -> None:
    ink = stage(tmp_path, "rdm")
    with wandb_reporter(ink) as report:
        for done in (1, 2, 3):
            report(RECORD, 2 << 30, done)
    [path] = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert path.name == f"run-databases-ink-{ink.fingerprint}.wandb"
    # Another process writes the file, on a busy machine only after the run has finished.
    until = time.monotonic() + 60
    while (stored := path.read_bytes()).count(b"train/not_kept/timeout") < 3 and time.monotonic() < until:
        time.sleep(0.1)
    assert stored.count(b"train/rows_per_s") >= 3
    assert stored.count(b"train/not_kept/timeout") >= 3


def test_nothing_is_written_without_a_project(tmp_path: Path) -> None:
    with wandb_reporter(stage(tmp_path, "")) as report:
        report(RECORD, 0, 1)
    assert not (tmp_path / "wandb").exists()


def test_a_missing_login_stops_the_stage_and_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: object) -> None:
        raise wandb.errors.AuthenticationError("no API key")

    monkeypatch.setattr(wandb, "init", fail)
    with (
        pytest.raises(UserError, match=r"does not start: no API key.*WANDB_MODE=offline"),
        wandb_reporter(stage(tmp_path, "x")),
    ):
        pass
