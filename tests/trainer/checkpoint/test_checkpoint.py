from pathlib import Path

import pytest
import torch
import torch.distributed

from retrieval.errors import NodeError, UserError
from retrieval.storage.lease import lease
from retrieval.storage.root import Root
from tests.trainer.training.launched import fork
from trainer.checkpoint.checkpoint import CheckpointFolder, Progress
from trainer.checkpoint.fragment_files import SavedFragments, write_fragments
from trainer.engine.deepspeed_engine import Ranks
from trainer.engine.fragments import Fragment
from trainer.training.disk import check_shared, lease_number

ONE_RANK = Ranks(0, 1, torch.device("cpu"))
KEY = "master/w@0"


@pytest.fixture
def checkpoints(tmp_path: Path) -> CheckpointFolder:
    return CheckpointFolder(Root(tmp_path / "checkpoints"), "test", {"a": 1}, keep=1, keep_every=0)


def test_a_checkpoint_loads_on_other_numbers_of_ranks_and_at_other_zero_stages(tmp_path: Path) -> None:
    for ranks, *actions in ((2, "write"), (1, "read", "write"), (2, "read")):
        argv = ["state_moved", str(tmp_path), *actions]
        code, log = fork(argv, tmp_path / "log", ranks)
        assert code == 0, log


def test_a_checkpoint_is_complete_or_absent_when_its_ranks_are_killed(tmp_path: Path) -> None:
    argv = ["checkpoint_killed", str(tmp_path / "checkpoints")]
    code, log = fork(argv, tmp_path / "log", ranks=1)
    assert code == 0, log


def test_a_checkpoint_has_the_state_at_the_time_of_saving(process_group: None, checkpoints: CheckpointFolder) -> None:
    weights = torch.zeros(20_000_000)
    checkpoints.save_tensors({KEY: weights}, Progress(1), ONE_RANK)
    weights += 1
    checkpoints.finish()
    fragment = Fragment("w", 5, torch.ones(19_999_990))
    with SavedFragments(checkpoints.root, "step-00000001", ["rank-00000.safetensors"]) as saved:
        saved.read_into("master", fragment)
    assert not fragment.values.any()


def test_saving_waits_for_a_copy_in_memory_and_not_for_the_disk(
    process_group: None, checkpoints: CheckpointFolder
) -> None:
    for step in (1, 2):
        checkpoints.save_tensors({KEY: torch.zeros(20_000_000)}, Progress(step), ONE_RANK)
        assert checkpoints.newest_step() == step - 1
    checkpoints.finish()
    assert checkpoints.newest_step() == 2
    assert [path.name for path in checkpoints.root.local_path("").glob("step-*")] == ["step-00000002"]


def test_a_checkpoint_that_cannot_be_written_is_an_error_and_keeps_the_previous_one(
    process_group: None, checkpoints: CheckpointFolder
) -> None:
    checkpoints.save_tensors({KEY: torch.zeros(3)}, Progress(1), ONE_RANK)
    checkpoints.finish()
    (checkpoints.root.local_path("") / "step-00000002").write_text("a file instead of a folder")
    checkpoints.save_tensors({KEY: torch.zeros(3)}, Progress(2), ONE_RANK)
    with pytest.raises(
        NodeError, match=r"step-00000002: rank 0 could not write its part.*File exists.*Free disk space"
    ):
        checkpoints.finish()
    assert checkpoints.newest_step() == 1


def test_a_run_that_lost_its_lease_writes_no_file_over_those_of_its_successor(
    process_group: None, checkpoints: CheckpointFolder
) -> None:
    def lost() -> None:
        raise UserError("another process works on it")

    checkpoints.before_publishing = lost
    checkpoints.save_tensors({KEY: torch.zeros(3)}, Progress(1), ONE_RANK)
    with pytest.raises(UserError, match="another process works on it") as raised:
        checkpoints.finish()
    assert not isinstance(raised.value, NodeError)
    assert not checkpoints.root.list("")


def test_files_that_a_checkpoint_does_not_name_are_not_read(process_group: None, checkpoints: CheckpointFolder) -> None:
    write_fragments(checkpoints.root, "step-00000001/rank-00001.safetensors", {KEY: torch.ones(3)})
    checkpoints.save_tensors({KEY: torch.zeros(3)}, Progress(1), ONE_RANK)
    checkpoints.finish()
    [average] = checkpoints.read_averages(checkpoints.entries()[0], {"w": torch.Size([3])}, ["master"])
    assert not average["w"].any()


def test_an_old_checkpoint_that_cannot_be_deleted_does_not_end_the_run(
    process_group: None,
    checkpoints: CheckpointFolder,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(self: Root, name: str) -> None:
        raise NodeError("the store does not answer")

    monkeypatch.setattr(Root, "delete", fail)
    for step in (1, 2):
        checkpoints.save_tensors({KEY: torch.zeros(3)}, Progress(step), ONE_RANK)
    checkpoints.finish()
    assert [entry["step"] for entry in checkpoints.entries()] == [2]
    assert "step-00000001 is deleted by the next start: the store does not answer" in caplog.text


def test_checkpoints_in_deepspeeds_layout_are_an_error(checkpoints: CheckpointFolder) -> None:
    checkpoints.root.local_path("").mkdir()
    old = '{"identity": "test", "settings": {"a": 1}, "checkpoints": [{"tag": "step-4", "step": 4}]}'
    (checkpoints.root.local_path("") / "checkpoints.json").write_text(old)
    with pytest.raises(UserError, match=r"another run: layout was 1, is now 3\. Choose another train\.name"):
        checkpoints.check(10)


def test_a_rank_without_access_to_the_disk_of_rank_0_is_an_error(
    process_group: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.training.disk.VISIBLE_WITHIN_S", 0)
    with lease(Root(tmp_path), "runs/tiny/train"):
        number = lease_number(Root(tmp_path), "runs/tiny/train")
        check_shared(Root(tmp_path), "runs/tiny/train", number, ONE_RANK)
        ranks = Ranks(1, 2, torch.device("cpu"))
        monkeypatch.setattr(torch.distributed, "broadcast", lambda token, _: token.fill_(5))
        with pytest.raises(UserError, match=r"elsewhere: rank 1 does not see the lease .* all machines of the run"):
            check_shared(Root(tmp_path / "elsewhere"), "runs/tiny/train", 0, ranks)


def test_checkpoints_after_a_step_can_be_deleted(process_group: None, tmp_path: Path) -> None:
    checkpoints = CheckpointFolder(Root(tmp_path / "checkpoints"), "test", {}, keep=1, keep_every=1)
    for step in (1, 2, 3):
        checkpoints.save_tensors({KEY: torch.zeros(3)}, Progress(step), ONE_RANK)
    checkpoints.finish()
    checkpoints.delete_after(2)
    assert [entry["step"] for entry in checkpoints.entries()] == [1, 2]
    folders = sorted(path.name for path in checkpoints.root.local_path("").glob("step-*"))
    assert folders == ["step-00000001", "step-00000002"]
    CheckpointFolder(Root(tmp_path / "none"), "test", {}, keep=1, keep_every=1).delete_after(2)


def test_ranks_that_are_connected_at_the_start_need_no_network_interface_later(
    process_group: None, checkpoints: CheckpointFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints.connect()
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "missing0")
    checkpoints.save_tensors({KEY: torch.zeros(3)}, Progress(1), ONE_RANK)
    checkpoints.finish()
    assert checkpoints.newest_step() == 1
    with pytest.raises(UserError, match=r"does not connect the ranks: .*missing0.* Set GLOO_SOCKET_IFNAME"):
        CheckpointFolder(Root(tmp_path), "test", {}, keep=1, keep_every=0).connect()


def test_a_snapshot_of_a_run_that_lost_its_lease_is_not_published(
    process_group: None, checkpoints: CheckpointFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("retrieval.storage.lease._lost", {"runs/tiny/train"})
    checkpoints.save_tensors({KEY: torch.zeros(3)}, Progress(1), ONE_RANK)
    with pytest.raises(UserError, match="runs/tiny/train was taken over by another process"):
        checkpoints.finish()
    assert not checkpoints.root.list("")


def test_the_error_for_a_damaged_checkpoint_names_the_earlier_one(process_group: None, tmp_path: Path) -> None:
    checkpoints = CheckpointFolder(Root(tmp_path / "checkpoints"), "test", {}, keep=2, keep_every=0)
    for step in (1, 2):
        checkpoints.save_tensors({KEY: torch.zeros(3)}, Progress(step), ONE_RANK)
    checkpoints.finish()
    first, second = checkpoints.entries()
    for entry in (second, first):
        checkpoints.root.delete(f"{entry['tag']}/rank-00000.safetensors")
    with pytest.raises(UserError, match=r"has 0: .* delete the entry of step-00000002 in .* to go on from step 1\."):
        checkpoints.check_files(second)
    with pytest.raises(UserError, match=r"or delete .*checkpoints to start over"):
        checkpoints.check_files(first)


def test_a_checkpoint_with_a_changed_byte_is_not_read(process_group: None, checkpoints: CheckpointFolder) -> None:
    checkpoints.save_tensors({KEY: torch.zeros(3)}, Progress(1), ONE_RANK)
    checkpoints.finish()
    entry, shapes = checkpoints.entries()[0], {"w": torch.Size([3])}
    path = checkpoints.root.local_path("step-00000001/rank-00000.safetensors")
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(UserError, match=r"rank-00000\.safetensors is damaged: its SHA-256 .* to start over"):
        list(checkpoints.read_averages(entry, shapes, ["master"]))
    del entry["digests"]  # as in checkpoints of earlier versions
    assert list(checkpoints.read_averages(entry, shapes, ["master"]))
