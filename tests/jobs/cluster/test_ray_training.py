"""Which group of workers Ray Train starts, and after which failures it starts one again."""

from pathlib import Path

import pytest
import ray
from ray.train import ControllerError, TrainingFailedError, WorkerGroupError
from ray.train.torch import TorchConfig

from jobs.cluster.ray_training import fit_with_restarts, make_trainer
from retrieval.errors import NodeError, UserError
from retrieval.storage.root import Root
from tests.trainer.training_set import make_recipe
from trainer.checkpoint.checkpoint import INDEX, LAYOUT, CheckpointFolder

NODE = NodeError("the disk / is full")
MISTAKE = UserError("k is wrong")
LOST = RuntimeError("the actor died")
STEPS = 5


class Attempts:
    """Attempts that write a checkpoint at a step, then fail, or end if there is no error."""

    def __init__(self, folder: CheckpointFolder, *attempts: tuple[int, TrainingFailedError | None]) -> None:
        self.folder, self.left = folder, list(attempts)

    def __call__(self) -> None:
        step, error = self.left.pop(0)
        write_index(self.folder, step, self.folder.identity)
        if error:
            raise error


def write_index(folder: CheckpointFolder, step: int, identity: str) -> None:
    index = {"identity": identity, "layout": LAYOUT, "settings": {}, "checkpoints": [{"step": step}]}
    folder.root.write_json(INDEX, index)


@pytest.fixture
def folder(tmp_path: Path) -> CheckpointFolder:
    return CheckpointFolder(Root(tmp_path), "test", {}, keep=1, keep_every=0)


def failed(*failures: Exception) -> WorkerGroupError:
    """The error of a worker group, with the exception of each rank."""
    return WorkerGroupError("failed", dict(enumerate(failures)))


@pytest.mark.parametrize(("gpus", "backend"), [(4, "nccl"), (0, "gloo")])
def test_collectives_wait_as_long_as_the_recipe_says(
    gpus: int, backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 8.0} | ({"GPU": float(gpus)} if gpus else {}))
    trainer = make_trainer(make_recipe("", timeout_minutes=7), Root(tmp_path))
    assert trainer.backend_config == TorchConfig(backend=backend, timeout_s=420)
    assert trainer.scaling_config.num_workers == max(1, gpus)
    assert trainer.scaling_config.use_gpu == bool(gpus)


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (failed(NODE), "the disk / is full"),
        (failed(LOST, NODE), "the disk / is full"),
        (failed(LOST), "a worker was lost"),
        (ControllerError(LOST), "a worker was lost"),
    ],
)
def test_a_lost_worker_or_a_fault_of_a_node_restarts_training_that_has_advanced(
    error: TrainingFailedError, cause: str, folder: CheckpointFolder, caplog: pytest.LogCaptureFixture
) -> None:
    attempts = Attempts(folder, (2, error), (4, error), (5, None))
    fit_with_restarts(attempts, folder, STEPS)
    assert not attempts.left
    assert [record.message for record in caplog.records] == [f"restarting from step {step}: {cause}" for step in (2, 4)]


@pytest.mark.parametrize(
    ("error", "raised"), [(failed(LOST, NODE), NODE), (failed(LOST), "Training failed due to worker errors")]
)
def test_training_that_has_not_advanced_ends_with_the_fault(
    error: WorkerGroupError, raised: Exception | str, folder: CheckpointFolder
) -> None:
    attempts = Attempts(folder, (2, error), (2, error), (4, None))
    with pytest.raises((NodeError, TrainingFailedError), match=str(raised)):
        fit_with_restarts(attempts, folder, STEPS)
    assert attempts.left == [(4, None)]


@pytest.mark.parametrize("identity", ["another run", "test"])
def test_a_run_that_replaces_one_at_a_higher_step_restarts_from_its_own_checkpoint(
    identity: str, folder: CheckpointFolder, caplog: pytest.LogCaptureFixture
) -> None:
    write_index(folder, 100, identity)
    fit_with_restarts(Attempts(folder, (2, failed(LOST)), (STEPS, None)), folder, STEPS)
    assert [record.message for record in caplog.records] == ["restarting from step 2: a worker was lost"]


def test_a_run_that_ends_before_it_replaces_the_former_one_is_not_started_again(folder: CheckpointFolder) -> None:
    class EndsAtOnce(Attempts):
        def __call__(self) -> None:
            raise failed(NODE)

    write_index(folder, 100, "another run")
    with pytest.raises(NodeError, match="the disk / is full"):
        fit_with_restarts(EndsAtOnce(folder), folder, STEPS)


@pytest.mark.parametrize("error", [failed(MISTAKE), failed(NODE, MISTAKE, LOST)])
def test_a_mistake_of_the_user_ends_training_at_once(error: WorkerGroupError, folder: CheckpointFolder) -> None:
    with pytest.raises(UserError, match="k is wrong"):
        fit_with_restarts(Attempts(folder, (2, error)), folder, STEPS)
