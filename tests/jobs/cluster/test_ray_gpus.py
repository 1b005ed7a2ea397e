"""Training on Ray waits for GPUs. Where some are there, the CPUs of Ray take their place."""

import logging
import threading
from collections.abc import Iterator
from logging.handlers import QueueHandler
from pathlib import Path
from queue import SimpleQueue

import pytest
import ray
from ray.train import TrainingFailedError
from ray.util import placement_group, placement_group_table, remove_placement_group

from jobs.cluster import ray_gpus
from jobs.cluster.ray_gpus import uses_gpus, wait_for_gpus
from jobs.cluster.ray_training import fit, make_trainer
from retrieval.errors import UserError
from retrieval.storage.root import Root
from tests.trainer.training_set import make_recipe

RANKS = 2

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture(autouse=True)
def no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine may have GPUs."""
    monkeypatch.setattr(ray_gpus, "RESOURCE", "gpu_of_no_node")


@pytest.fixture
def on_a_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", ray.get_runtime_context().gcs_address)


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Iterator[SimpleQueue[logging.LogRecord]]:
    """The lines of the log of training."""
    caplog.set_level(logging.INFO, ray_gpus.log.name)
    records: SimpleQueue[logging.LogRecord] = SimpleQueue()
    handler = QueueHandler(records)
    ray_gpus.log.addHandler(handler)
    yield records
    ray_gpus.log.removeHandler(handler)


def num_waiting() -> int:
    """Placement groups that wait for resources."""
    return [group["state"] for group in placement_group_table().values()].count("PENDING")


def test_training_waits_until_each_rank_has_a_gpu_and_then_leaves_them_to_the_ranks(
    lines: SimpleQueue[logging.LogRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_gpus, "RESOURCE", "CPU")
    others = placement_group([{"CPU": 1}])
    assert others.wait(300)
    waited: SimpleQueue[bool] = SimpleQueue()

    def wait() -> None:
        wait_for_gpus(RANKS, 3600)
        waited.put(True)

    thread = threading.Thread(target=wait)
    thread.start()
    line = lines.get(timeout=300).getMessage()
    assert line.startswith("waiting for 2 GPUs: 2 there, ")
    assert line.endswith(" s left")
    assert num_waiting() == 1
    assert waited.empty()
    remove_placement_group(others)
    assert waited.get(timeout=300)
    thread.join()
    ranks = placement_group([{"CPU": 1}] * RANKS)
    assert ranks.wait(300)
    remove_placement_group(ranks)


def test_too_few_gpus_are_an_error_after_the_limit_and_are_not_asked_for_any_longer(on_a_cluster: None) -> None:
    with pytest.raises(UserError) as error:
        wait_for_gpus(RANKS, 0)
    where = ray.get_runtime_context().gcs_address
    assert str(error.value) == (
        f"GPUs of the Ray cluster {where}: 0 there, 0 of them free, after 0 s. Wanted: 2 free ones, one for each rank. "
        "Start nodes with GPUs, let the autoscaler start more of them (maxReplicas of a KubeRay group), lower "
        "train.ranks, or raise train.wait_for_gpus_s."
    )
    assert num_waiting() == 0


def test_no_node_is_waited_for_if_ray_runs_on_this_machine_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(UserError, match="0 there, 0 of them free, after 0 s"):
        wait_for_gpus(RANKS, 3600)


@pytest.mark.parametrize(
    ("address", "ranks", "wait_s", "expected"),
    [("head:6379", 2, 1800, True), ("head:6379", 2, 0, False), ("head:6379", 0, 1800, False), ("", 2, 1800, False)],
)
def test_ranks_run_on_gpus_that_are_not_there_yet_if_their_number_is_known_and_nodes_may_join(
    address: str, ranks: int, wait_s: int, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert uses_gpus(make_recipe("", ranks=ranks, wait_for_gpus_s=wait_s).train) is expected


def test_an_attempt_to_train_starts_no_rank_before_its_gpus_are_there(
    tmp_path: Path, on_a_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe("", ranks=RANKS, wait_for_gpus_s=1)
    trainer = make_trainer(recipe, Root(tmp_path))
    assert trainer.scaling_config.use_gpu

    def started() -> None:
        raise TrainingFailedError("started")

    monkeypatch.setattr(trainer, "fit", started)
    with pytest.raises(UserError, match="after 1 s"):
        fit(trainer, recipe)


def test_ray_train_gives_up_when_the_ranks_get_no_resources(
    tmp_path: Path, lines: SimpleQueue[logging.LogRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_gpus, "RELEASE_S", 1)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv(ray_gpus.START_TIMEOUT, "")  # which is restored after the test
    cpus = int(ray.cluster_resources()["CPU"])
    recipe = make_recipe("", ranks=cpus + 1)
    with pytest.raises(UserError, match=f"within 1 s. Resource CPU: {cpus} there, . of them free, wanted: {cpus + 1}"):
        fit(make_trainer(recipe, Root(tmp_path)), recipe)
    messages = [lines.get_nowait().getMessage() for _ in range(lines.qsize())]
    assert messages[-1] == f"starting {cpus + 1} ranks: Ray waits up to 1 s until {cpus + 1} CPUs are free"
