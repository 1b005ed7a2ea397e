"""A shared cluster: two drivers on one Ray search it."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import ray

from retrieval import Database, UserError
from retrieval.cluster import SharedCluster, shared
from retrieval.index.routing import Vectors

pytestmark = pytest.mark.usefixtures("ray_cluster")

SETTINGS = {"cpus_per_actor": 0.5, "restart_timeout_s": 300}
START = """
import sys
from retrieval.cluster import SharedCluster, ray_connection
with ray_connection():
    print(len(SharedCluster.start("pictures", sys.argv[1], cpus_per_actor=0.5, restart_timeout_s=300)))
"""


@pytest.fixture
def folder(in_partitions: Database) -> str:
    return str(in_partitions.root.local_path(""))


@pytest.fixture(autouse=True)
def no_cluster_stays(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Stops what a failed test leaves, and waits longer for the end of a cluster."""
    monkeypatch.setattr(shared, "STOP_TIMEOUT_S", 300)
    yield
    for name in ("pictures", "again", "broken"):
        with suppress(UserError):
            SharedCluster.connect(name).stop()


def test_a_cluster_of_another_driver_is_found_by_name_and_searched_after_that_driver_has_ended(
    in_partitions: Database, folder: str, queries: Vectors, forked_python: Path
) -> None:
    address = ray.get_runtime_context().gcs_address
    variables = os.environ | {"RAY_ADDRESS": address, "RAY_AUTH_MODE": "disabled"}
    command = [str(forked_python), "-c", START, folder]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "3000"
    cluster = SharedCluster.connect("pictures")
    table = cluster.search(queries, 5, metadata=True)
    expected = in_partitions.search(queries, 5)
    np.testing.assert_array_equal(table["similarity"], expected.similarities.reshape(-1))
    np.testing.assert_array_equal(table["image_id"], expected.ids.reshape(-1))
    assert table["caption"].to_pylist()[:5] == expected.rows[0]["caption"].to_pylist()
    with pytest.raises(UserError, match="recall must be above 0"):
        cluster.search(queries, 5, recall=1.5)
    with pytest.raises(UserError, match="a cluster 'pictures' runs already"):
        SharedCluster.start("pictures", folder)
    with pytest.raises(UserError, match="no cluster 'picture' runs on this Ray; these run: pictures"):
        SharedCluster.connect("picture")


def test_a_stopped_cluster_refuses_and_its_name_is_free_again(
    folder: str, queries: Vectors, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(folder).parent)  # the actors have another working folder
    for _ in range(2):
        cluster = SharedCluster.start("again", Path(folder).name, **SETTINGS)
        assert len(cluster.search(queries[:1], 3)) == 3
        cluster.stop()
        with pytest.raises(UserError, match="the cluster 'again' does not run"):
            cluster.search(queries[:1], 3)


def test_a_cluster_that_cannot_start_says_why_and_leaves_no_actor(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"'broken' of .* did not start: .*manifest\.json"):
        SharedCluster.start("broken", str(tmp_path))
    with pytest.raises(UserError, match=r"did not start: .*the cluster has 2"):
        SharedCluster.start("broken", folder, cpus_per_actor=3)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ray, "get", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        SharedCluster.start("broken", folder, **SETTINGS)
    with pytest.raises(UserError, match="the name of a shared cluster is empty"):
        SharedCluster.start("", folder)
    with pytest.raises(UserError, match="these run: none"):
        SharedCluster.connect("broken")
