from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed

from retrieval.errors import UserError
from tests.trainer.training.launched import fork
from trainer.checkpoint.checkpoint import CheckpointFolder
from trainer.checkpoint.fragment_files import SavedFragments
from trainer.engine.deepspeed_engine import Ranks
from trainer.engine.fragments import Fragment
from trainer.training.disk import check_shared

ALONE = Ranks(0, 1, torch.device("cpu"))
KEY = "master/w@0"


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of one."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture
def checkpoints(tmp_path: Path) -> CheckpointFolder:
    return CheckpointFolder(tmp_path / "checkpoints", "test", {"a": 1}, keep=1, keep_every=0)


def test_a_state_goes_on_from_any_number_of_ranks_and_any_split_to_any_other(tmp_path: Path) -> None:
    for ranks, *words in ((2, "write"), (1, "read", "write"), (2, "read")):
        code, log = fork(["tests.trainer.checkpoint.state_moved", str(tmp_path), *words], tmp_path / "log", ranks)
        assert code == 0, log


def test_a_checkpoint_is_complete_or_absent_whenever_its_ranks_are_killed(tmp_path: Path) -> None:
    code, log = fork(["tests.trainer.checkpoint.checkpoint_killed", str(tmp_path / "checkpoints")], tmp_path / "log", ranks=1)
    assert code == 0, log


def test_what_is_written_is_the_state_when_it_was_saved(alone: None, checkpoints: CheckpointFolder) -> None:
    weights = torch.zeros(20_000_000)
    checkpoints.save_pieces({KEY: weights}, 1, ALONE)
    weights += 1
    checkpoints.finish()
    piece = Fragment("w", 5, torch.ones(19_999_990))
    with SavedFragments(checkpoints.path / "step-00000001") as saved:
        saved.fill("master", piece)
    assert not piece.values.any()


def test_saving_waits_for_a_copy_and_not_for_the_disk(alone: None, checkpoints: CheckpointFolder) -> None:
    for step in (1, 2):
        checkpoints.save_pieces({KEY: torch.zeros(20_000_000)}, step, ALONE)
        assert checkpoints.newest_step() == step - 1
    checkpoints.finish()
    assert checkpoints.newest_step() == 2
    assert [path.name for path in checkpoints.path.glob("step-*")] == ["step-00000002"]


def test_a_checkpoint_that_cannot_be_written_stops_the_run_and_leaves_the_one_before(
    alone: None, checkpoints: CheckpointFolder
) -> None:
    checkpoints.save_pieces({KEY: torch.zeros(3)}, 1, ALONE)
    checkpoints.finish()
    (checkpoints.path / "step-00000002").write_text("in the way")
    checkpoints.save_pieces({KEY: torch.zeros(3)}, 2, ALONE)
    with pytest.raises(
        UserError, match=r"step-00000002: rank 0 could not write its part.*File exists.*Make room"
    ):
        while True:
            checkpoints.raise_failure()
    assert checkpoints.newest_step() == 1


def test_checkpoints_in_deepspeeds_own_layout_are_refused(checkpoints: CheckpointFolder) -> None:
    checkpoints.path.mkdir()
    old = '{"identity": "test", "settings": {"a": 1}, "checkpoints": [{"tag": "step-4", "step": 4}]}'
    (checkpoints.path / "checkpoints.json").write_text(old)
    with pytest.raises(UserError, match=r"another run: layout 1 there, 2 here\. Choose another train\.name"):
        checkpoints.check(10)


def test_a_rank_that_does_not_see_the_first_ones_disk_is_refused(
    alone: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.training.disk.SEEN_WITHIN_S", 0)
    with (tmp_path / "lock").open("w+") as lock:
        check_shared(lock.fileno(), tmp_path / "lock", ALONE)
        (tmp_path / "elsewhere").mkdir()
        with pytest.raises(
            UserError, match=r"elsewhere/lock: rank 0 does not see .* all machines of the run"
        ):
            check_shared(lock.fileno(), tmp_path / "elsewhere" / "lock", ALONE)
