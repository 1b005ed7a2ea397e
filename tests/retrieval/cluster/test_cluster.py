"""A cluster returns what a search in one process returns, also while its actors are killed."""

import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import ray

from retrieval import Database, Root, UserError
from retrieval.cluster import cluster as cluster_module
from retrieval.cluster import replicas as replicas_module
from retrieval.cluster.cluster import PROCESS_BYTES, Cluster, distribute
from retrieval.database.build import DatabaseIdentity, write_database
from retrieval.database.result_table import RESULT_SCHEMA
from retrieval.errors import RecallWarning
from retrieval.index.routing import Vectors, partition_folder
from retrieval.recipe import IndexConfig
from retrieval.storage import schema
from tests.retrieval.conftest import IDENTITY, clustered, table_of

Build = Callable[..., Database]

pytestmark = pytest.mark.usefixtures("ray_cluster")

HALF = 0.5  # CPUs: so that four actors fit the two CPUs of the tests' Ray


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Database:
    """6,000 rows in six partitions, some of them with inverted lists."""
    root = Root(tmp_path_factory.mktemp("cluster"))
    config = IndexConfig(rows_per_partition=1000, flat_rows=1000, num_queries=20)
    write_database(
        root, table_of(clustered(6000, seed=1)), IDENTITY, config, DatabaseIdentity("six", {"source": "test"})
    )
    return Database.open(root.child("six"))


@pytest.fixture
def opened() -> Iterator[Callable[..., Cluster]]:
    """Opens clusters and closes them after the test."""
    clusters: list[Cluster] = []

    def open_(*args: object, **settings: object) -> Cluster:
        clusters.append(Cluster.open(*args, **{"restart_timeout_s": 300} | settings))
        return clusters[-1]

    yield open_
    for each in clusters:
        each.close()


Open = Callable[..., Cluster]


def assert_same(table: pa.Table, database: Database, queries: Vectors, k: int, **settings: object) -> None:
    """The table equals the result of a search in this process, to the last bit."""
    neighbors = database.search(queries, k, **settings)
    count = neighbors.ids.shape[1]
    assert table.schema.equals(RESULT_SCHEMA)
    np.testing.assert_array_equal(table["query"], np.repeat(np.arange(len(queries)), count))
    np.testing.assert_array_equal(table["rank"], np.tile(np.arange(count), len(queries)))
    np.testing.assert_array_equal(table[schema.IMAGE_ID], neighbors.ids.reshape(-1))
    np.testing.assert_array_equal(table["position"], neighbors.positions.reshape(-1))
    np.testing.assert_array_equal(table["similarity"], neighbors.similarities.reshape(-1))


def kill_one(cluster: Cluster, seed: int) -> set[int]:
    """Kill the process of a running actor, if there is one, and return its process id."""
    running = cluster.status()
    if not running:
        return set()
    pid = running[seed % len(running)].pid
    os.kill(pid, signal.SIGKILL)
    return {pid}


def test_partitions_are_distributed_evenly_and_reproducibly() -> None:
    sizes = np.random.default_rng(5).zipf(1.4, 200).clip(max=300).tolist()
    groups = distribute(sizes, 7)
    loads = [sum(sizes[number] for number in group) for group in groups]
    assert sorted(number for group in groups for number in group) == list(range(200))
    assert all(group == sorted(group) for group in groups)
    assert max(loads) - min(loads) <= min(sizes)
    assert distribute(sizes, 7) == groups


def test_every_actor_gets_a_partition_also_if_partitions_are_few_or_empty() -> None:
    assert distribute([5, 9], 4) == [[1], [0]]
    assert distribute([0, 0, 0, 4], 3) == [[3], [0, 2], [1]]


def test_a_cluster_returns_what_one_process_returns(
    database: Database, queries: Vectors, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = opened(database, actors=3, cpus_per_actor=HALF)
    assert len(cluster.status()) == 3
    assert_same(cluster.search(queries, 19), database, queries, 19)
    assert_same(cluster.search(queries[:1], 1), database, queries[:1], 1)
    assert_same(cluster.search(queries[:0], 3), database, queries[:0], 3)
    effort = database.effort(0.5)
    assert_same(cluster.search(queries, 7, effort=effort), database, queries, 7, effort=effort)
    monkeypatch.setattr(cluster_module, "INLINE_BYTES", 0)
    longer = queries.astype(np.float64) * 9
    assert_same(cluster.search(longer, 19), database, longer, 19)
    monkeypatch.setattr(cluster_module, "BLOCK_QUERIES", 8)
    in_blocks = cluster.search(queries, 19)
    whole = database.search(queries, 19)
    np.testing.assert_array_equal(in_blocks[schema.IMAGE_ID], whole.ids.reshape(-1))
    np.testing.assert_array_equal(in_blocks["query"], np.repeat(np.arange(len(queries)), 19))


def test_results_include_metadata_and_meet_a_condition_on_request(
    database: Database, queries: Vectors, opened: Open
) -> None:
    cluster, condition = opened(database, actors=2, cpus_per_actor=HALF), "image_id > 4000 and '1' in caption"
    table = cluster.search(queries, 6, metadata=True)
    for query, rows in enumerate(database.search(queries, 6).rows):
        assert table.slice(6 * query, 6).select(schema.METADATA.names).to_pylist() == rows.to_pylist()
    assert_same(cluster.search(queries, 5, where=condition), database.where(condition), queries, 5)
    single = cluster.submit(queries[0], 5, where=condition).result()
    assert_same(single, database.where(condition), queries[:1], 5)
    with pytest.raises(UserError, match="The columns are image_id"):
        cluster.search(queries, 5, where="size > 4000")


def test_empty_partitions_and_fewer_rows_than_k_are_searched(build: Build, opened: Open) -> None:
    few = np.repeat(clustered(6, seed=3), 4, axis=0)
    database = build(few, rows_per_partition=2)
    assert (database.partition_rows == 0).any()
    cluster = opened(database, actors=3, cpus_per_actor=HALF)
    queries = clustered(9, seed=4)
    assert_same(cluster.search(queries, 5), database, queries, 5)
    everything = cluster.search(queries, 100)
    assert_same(everything, database, queries, 100)
    assert len(everything) == 9 * 24


def test_texts_get_the_effort_for_texts(database: Database, queries: Vectors, opened: Open) -> None:
    cluster = opened(Database.open(database.root), cpus_per_actor=HALF)
    with pytest.warns(RecallWarning, match="no calibration for texts"):
        table = cluster.search(queries, 5, like="texts")
    with pytest.warns(RecallWarning, match="no calibration for texts"):
        assert_same(table, Database.open(database.root), queries, 5, like="texts")


def test_hidden_rows_stay_hidden(database: Database, queries: Vectors, opened: Open) -> None:
    hidden = np.unique(database.search(queries, 3).ids)
    without = database.without(hidden)
    table = opened(without, actors=2, cpus_per_actor=HALF).search(queries, 10)
    assert_same(table, without, queries, 10)
    assert not np.isin(table[schema.IMAGE_ID], hidden).any()
    assert len(table) == 10 * len(queries)


def test_replicas_share_the_calls_equally(build: Build, vectors: Vectors, opened: Open) -> None:
    database = build(vectors[:500])
    folder = str(database.root.local_path(""))
    cluster = opened(folder, actors=4, replicas=2, cpus_per_actor=HALF, repeat_after_s=300)
    for query in vectors[:10]:
        assert_same(cluster.search(query[None], 4), database, query[None], 4)
    assert [status.calls for status in cluster.status()] == [5, 5]
    assert len({status.pid for status in cluster.status()}) == 2


@pytest.mark.parametrize("replicas", [1, 2])
def test_no_result_is_lost_when_actors_are_killed_while_four_threads_search(
    database: Database, queries: Vectors, opened: Open, replicas: int
) -> None:
    cluster = opened(database, actors=2, replicas=replicas, cpus_per_actor=HALF)
    expected = database.search(queries, 8).ids
    stop = threading.Event()

    def stream(thread: int) -> int:
        rng = np.random.default_rng(thread)
        count = 0
        while not stop.is_set():
            numbers = rng.choice(len(queries), 5)
            table = cluster.search(queries[numbers], 8)
            np.testing.assert_array_equal(table[schema.IMAGE_ID], expected[numbers].reshape(-1))
            single = cluster.submit(queries[numbers[0]], 8).result()
            np.testing.assert_array_equal(single[schema.IMAGE_ID], expected[numbers[0]])
            count += 1
        return count

    with ThreadPoolExecutor(4) as pool:
        streams = [pool.submit(stream, thread) for thread in range(4)]
        killed: set[int] = set()
        while len(killed) < 3 and not any(each.done() for each in streams):
            killed |= kill_one(cluster, len(killed))
            time.sleep(0.4)
        stop.set()
        assert all(each.result() >= 1 for each in streams)
    assert len(killed) == 3
    wait_for(lambda: len(cluster.status()) == 2 * replicas)
    assert not killed & {status.pid for status in cluster.status()}


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait until the condition holds; fail after five minutes."""
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_call_to_a_stopped_actor_is_answered_by_the_other_replica_or_fails_in_time(
    build: Build, vectors: Vectors, opened: Open
) -> None:
    database = build(vectors)
    cluster = opened(database, replicas=2, cpus_per_actor=HALF, repeat_after_s=0.3)
    alone = opened(database, cpus_per_actor=HALF, call_timeout_s=1)
    stopped = [cluster.status()[0].pid, alone.status()[0].pid]
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    try:
        for _ in range(2):  # one of two calls goes to the stopped actor
            assert_same(cluster.search(vectors[:3], 5), database, vectors[:3], 5)
        with pytest.raises(UserError, match="no answer to search within 1 s"):
            alone.search(vectors[:3], 5)
    finally:
        for pid in stopped:
            os.kill(pid, signal.SIGCONT)


def test_the_error_names_partitions_that_no_actor_can_open_again(
    database: Database, queries: Vectors, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = opened(database)
    [actors] = cluster._replicas

    def after_the_failure() -> float:
        """The timeout is over when a new actor has failed to open its files."""
        return time.monotonic() + 1000 * ("UserError" in actors._last_failure)

    monkeypatch.setattr(replicas_module, "time", SimpleNamespace(monotonic=after_the_failure, sleep=time.sleep))
    folder = str(database.root.local_path(""))
    shutil.move(folder, f"{folder}-away")
    kill_one(cluster, 0)
    with pytest.raises(UserError, match=r"partitions 0, 1, 2, 3, 4, 5 of .*six: no actor .* no manifest"):
        cluster.search(queries, 3)
    shutil.move(f"{folder}-away", folder)
    assert_same(cluster.search(queries, 3), database, queries, 3)


def test_single_queries_of_many_threads_are_sent_in_batches_and_get_their_own_results(
    database: Database, queries: Vectors, opened: Open
) -> None:
    cluster = opened(database, max_wait_ms=1e6, max_batch=25)
    neighbors = database.search(queries, 6)
    with ThreadPoolExecutor(16) as pool:
        futures = list(pool.map(lambda query: cluster.submit(query, 6), queries))
    for i, future in enumerate(futures):
        table = future.result()
        assert table["query"].to_pylist() == [0] * 6
        assert table["rank"].to_pylist() == list(range(6))
        np.testing.assert_array_equal(table[schema.IMAGE_ID], neighbors.ids[i])
        np.testing.assert_allclose(table["similarity"], neighbors.similarities[i], atol=1e-6)
    [status] = cluster.status()
    assert status.queries == 50
    assert status.calls == 2
    fewer, other = cluster.submit(queries[0], 3), cluster.submit(queries[0], 2, metadata=True)
    cluster.close()
    assert fewer.result().column_names == RESULT_SCHEMA.names
    assert other.result().num_rows == 2
    assert "caption" in other.result().column_names


def test_an_actor_reserves_the_memory_of_its_partitions_and_uses_its_cpus(database: Database, opened: Open) -> None:
    wait_for(lambda: ray.available_resources().get("CPU") == 2)
    before = ray.available_resources()["memory"]
    cluster = opened(database, cpus_per_actor=2)
    names = [name for number in range(6) for name in database.root.list(partition_folder(number))]
    reserved = PROCESS_BYTES + sum(database.root.size(name) for name in names)
    assert [group.memory for group in cluster.groups] == [reserved]
    wait_for(lambda: before - ray.available_resources()["memory"] == pytest.approx(reserved, rel=0.01))
    assert ray.available_resources().get("CPU", 0) == 0
    assert [status.threads for status in cluster.status()] == [2]
    cluster.close()
    wait_for(lambda: ray.available_resources().get("CPU") == 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"actors": 3}, "3 actors in 1 replicas need 3 CPUs; the cluster has 2"),
        ({"cpus_per_actor": 0.0001, "replicas": 1000}, "bytes of memory; the cluster has"),
        ({"actors": 0}, "greater than or equal to 1"),
        ({"actor": 1}, "Extra inputs are not permitted"),
    ],
)
def test_impossible_settings_are_refused(database: Database, settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Cluster.open(database, **settings)


def test_an_invalid_query_is_refused_before_anything_is_sent(
    database: Database, queries: Vectors, opened: Open
) -> None:
    cluster = opened(database)
    invalid = [(np.ones((1, 31)), 5), (np.zeros((1, 32)), 5), (np.full((1, 32), np.nan), 5), (queries, 0)]
    for query, k in invalid:
        with pytest.raises(UserError) as local:
            database.search(query, k)
        with pytest.raises(UserError) as remote:
            cluster.search(query, k)
        assert str(remote.value) == str(local.value)
        with pytest.raises(UserError):
            cluster.submit(query[0], k)
    with pytest.raises(UserError):
        cluster.submit(queries, 5)
    with pytest.raises(UserError):
        cluster.search(queries, 5, recall=1.5)
    assert [status.calls for status in cluster.status()] == [0]


def test_a_closed_cluster_finishes_submitted_queries_and_refuses_others(database: Database, queries: Vectors) -> None:
    with Cluster.open(database, max_wait_ms=10_000) as cluster:
        pid = cluster.status()[0].pid
        waiting = [cluster.submit(query, 4) for query in queries[:3]]
    for future, ids in zip(waiting, database.search(queries[:3], 4).ids):
        np.testing.assert_array_equal(future.result(0)[schema.IMAGE_ID], ids)
    wait_for(lambda: not alive(pid))
    for refused in (cluster.search, cluster.submit):
        with pytest.raises(UserError, match="is closed"):
            refused(queries[:1] if refused == cluster.search else queries[0], 4)
    cluster.close()
    assert ray.is_initialized()


def test_another_process_connects_to_ray_address_and_disconnects_again(
    database: Database, queries: Vectors, forked_python: Path
) -> None:
    code = (
        "import sys, numpy, ray\n"
        "from retrieval import UserError\n"
        "from retrieval.cluster.cluster import Cluster\n"
        "with Cluster.open(sys.argv[1]) as cluster:\n"
        "    print(cluster.search(numpy.array(eval(sys.argv[2])), 5)['image_id'].to_pylist())\n"
        "assert not ray.is_initialized()\n"
        "try:\n"
        "    cluster.search(numpy.ones((999, 32)), 5)\n"
        "except UserError:\n"
        "    sys.exit(ray.is_initialized())\n"
    )
    folder = str(database.root.local_path(""))
    done = subprocess.run(
        [forked_python, "-c", code, folder, repr(queries[:1].tolist())],
        env=os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address, "RAY_AUTH_MODE": "disabled"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    assert str(database.search(queries[:1], 5).ids[0].tolist()) in done.stdout
    assert ray.is_initialized()


def alive(pid: int) -> bool:
    """Whether a process of this id runs."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
