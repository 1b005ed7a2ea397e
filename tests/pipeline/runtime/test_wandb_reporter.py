import time
from pathlib import Path

import pytest
import wandb

from pipeline.runtime.stage import Stage
from pipeline.runtime.wandb_reporter import curves
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


def test_weights_and_biases_gets_a_point_a_shard_in_one_run_of_the_stage(tmp_path: Path) -> None:
    asked = stage(tmp_path, "rdm")
    with curves(asked) as tell:
        for done in (1, 2, 3):
            tell(RECORD, 2 << 30, done)
    [path] = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert path.name == f"run-databases-ink-{asked.fingerprint}.wandb"
    # A process of its own writes it, on a busy machine after the run was finished.
    until = time.monotonic() + 60
    while (stored := path.read_bytes()).count(b"train/not_kept/timeout") < 3 and time.monotonic() < until:
        time.sleep(0.1)
    assert stored.count(b"train/rows_per_s") >= 3
    assert stored.count(b"train/not_kept/timeout") >= 3


def test_nothing_is_told_where_no_project_is_named(tmp_path: Path) -> None:
    with curves(stage(tmp_path, "")) as tell:
        tell(RECORD, 0, 1)
    assert not (tmp_path / "wandb").exists()


def test_a_login_that_is_missing_stops_the_stage_and_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(**_: object) -> None:
        raise wandb.errors.AuthenticationError("no API key")

    monkeypatch.setattr(wandb, "init", refuses)
    with (
        pytest.raises(UserError, match=r"does not start: no API key.*WANDB_MODE=offline"),
        curves(stage(tmp_path, "x")),
    ):
        pass
