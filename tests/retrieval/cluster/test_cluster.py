"""A database over Ray actors: the answers of one process, whatever is killed; single queries in batches."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pytest
import ray

from retrieval import Database, Root, UserError
from retrieval.cluster import cluster as cluster_module
from retrieval.cluster.batching import Batcher, BatchLimits
from retrieval.cluster.cluster import PROCESS_BYTES, Cluster, distribute
from retrieval.database.build import DatabaseIdentity, write_database
from retrieval.database.result_table import RESULT_SCHEMA, merge_results
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
        clusters.append(Cluster.open(*args, **settings))
        return clusters[-1]

    yield open_
    for each in clusters:
        each.close()


Open = Callable[..., Cluster]


def assert_same(table: pa.Table, database: Database, queries: Vectors, k: int, **settings: object) -> None:
    """The table holds what a search in this process finds, to the last bit."""
    found = database.search(queries, k, **settings)
    count = found.ids.shape[1]
    assert table.schema.equals(RESULT_SCHEMA)
    np.testing.assert_array_equal(table["query"], np.repeat(np.arange(len(queries)), count))
    np.testing.assert_array_equal(table["rank"], np.tile(np.arange(count), len(queries)))
    np.testing.assert_array_equal(table[schema.IMAGE_ID], found.ids.reshape(-1))
    np.testing.assert_array_equal(table["position"], found.positions.reshape(-1))
    np.testing.assert_array_equal(table["similarity"], found.similarities.reshape(-1))


def kill_one(cluster: Cluster, seed: int) -> set[int]:
    """Kill the process of one of the actors that are up, if any is; its process id."""
    up = cluster.status()
    if not up:
        return set()
    pid = up[seed % len(up)].pid
    os.kill(pid, signal.SIGKILL)
    return {pid}


# The pure parts.


def test_partitions_are_spread_evenly_and_always_in_the_same_way() -> None:
    sizes = np.random.default_rng(5).zipf(1.4, 200).clip(max=300).tolist()
    shares = distribute(sizes, 7)
    loads = [sum(sizes[number] for number in share) for share in shares]
    assert sorted(number for share in shares for number in share) == list(range(200))
    assert all(share == sorted(share) for share in shares)
    assert max(loads) - min(loads) <= min(sizes)
    assert distribute(sizes, 7) == shares


def test_more_actors_than_partitions_and_empty_partitions_leave_no_actor_without_one() -> None:
    assert distribute([5, 9], 4) == [[1], [0]]
    assert distribute([0, 0, 0, 4], 3) == [[3], [0, 2], [1]]


def test_merging_gives_what_sorting_everything_gives_also_for_ties_and_short_answers() -> None:
    rng = np.random.default_rng(7)
    k, num_queries = 5, 40
    rows = {
        query: [(float(rng.integers(4)), int(position)) for position in rng.permutation(1000)[:12]]
        for query in range(num_queries)
    }
    parts = [answered(rows, k, lambda position, part=part: position % 4 == part) for part in range(3)]
    merged = merge_results(parts, num_queries, k)
    wanted = answered(rows, k, lambda position: position % 4 < 3)
    assert merged.schema.equals(wanted.schema)
    assert merged.to_pylist() == wanted.to_pylist()
    assert len(merged) < num_queries * k or len(parts[0]) < num_queries * k


def answered(rows: dict[int, list[tuple[float, int]]], k: int, mine: Callable[[int], bool]) -> pa.Table:
    """RESULT_SCHEMA, and the position again as a column `url`, of the k best rows that are mine."""
    lines = []
    for query, found in rows.items():
        best = sorted((-similarity, position) for similarity, position in found if mine(position))[:k]
        for rank, (negative, position) in enumerate(best):
            lines.append((query, rank, -position, -negative, position, str(position)))
    names = [*RESULT_SCHEMA.names, "url"]
    wanted = RESULT_SCHEMA.append(pa.field("url", pa.string()))
    return pa.Table.from_pylist([dict(zip(names, line)) for line in lines], schema=wanted)


class Recorder:
    """Doubles numbers, notes each batch, and waits at the gate before it answers."""

    def __init__(self) -> None:
        self.batches: list[tuple[str, list[int]]] = []
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, key: str, items: list[int]) -> list[int]:
        self.batches.append((key, items))
        self.gate.wait(10)
        if -1 in items:
            raise UserError("minus one")
        return [2 * item for item in items]


def test_items_that_come_together_go_together_and_never_with_another_key() -> None:
    run = Recorder()
    batcher: Batcher[str, int, int] = Batcher(run, BatchLimits(max_batch=4, max_wait_s=0.2, max_running=2))
    futures = [batcher.submit("ab"[i % 2], i) for i in range(12)]
    assert [future.result(5) for future in futures] == [2 * i for i in range(12)]
    assert sorted(run.batches) == [
        ("a", [0, 2, 4, 6]),
        ("a", [8, 10]),
        ("b", [1, 3, 5, 7]),
        ("b", [9, 11]),
    ]
    batcher.close()


def test_a_full_batch_does_not_wait_and_a_lone_item_waits_its_time() -> None:
    run = Recorder()
    batcher: Batcher[str, int, int] = Batcher(run, BatchLimits(max_batch=2, max_wait_s=0.3, max_running=2))
    begun = time.monotonic()
    full = [batcher.submit("a", 1), batcher.submit("a", 2)]
    alone = batcher.submit("b", 3)
    assert [future.result(5) for future in full] == [2, 4]
    assert time.monotonic() - begun < 0.25
    assert alone.result(5) == 6
    assert time.monotonic() - begun >= 0.3
    batcher.close()


def test_what_comes_while_all_are_at_work_gathers_into_one_batch() -> None:
    run = Recorder()
    run.gate.clear()
    batcher: Batcher[str, int, int] = Batcher(run, BatchLimits(max_batch=100, max_wait_s=0, max_running=1))
    first = batcher.submit("a", 0)
    while not run.batches:
        time.sleep(0.01)
    rest = [batcher.submit("a", i) for i in range(1, 50)]
    rest[5].cancel()
    run.gate.set()
    batcher.close()
    assert first.result(0) == 0
    assert [future.result(0) for future in rest if not future.cancelled()] == [
        2 * i for i in range(1, 50) if i != 6
    ]
    assert [len(items) for _, items in run.batches] == [1, 48]


def test_an_error_reaches_every_item_of_its_batch_and_no_other() -> None:
    run = Recorder()
    batcher: Batcher[str, int, int] = Batcher(run, BatchLimits(max_batch=2, max_wait_s=0.1, max_running=1))
    futures = [batcher.submit("a", item) for item in (1, -1, 3, 4)]
    errors = [future.exception(5) for future in futures]
    assert [isinstance(error, UserError) for error in errors] == [True, True, False, False]
    batcher.close()
    with pytest.raises(UserError, match="closed"):
        batcher.submit("a", 5)


# Over Ray.


@pytest.mark.parametrize("actors", [1, 2, 3])
def test_the_answers_are_those_of_one_process(
    database: Database, queries: Vectors, opened: Open, actors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = opened(database, actors=actors, cpus_per_actor=HALF)
    assert len(cluster.status()) == actors
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


def test_metadata_comes_with_the_answer_on_demand(database: Database, queries: Vectors, opened: Open) -> None:
    table = opened(database, actors=2, cpus_per_actor=HALF).search(queries, 6, metadata=True)
    for query, wanted in enumerate(database.search(queries, 6).rows):
        assert table.slice(6 * query, 6).select(schema.METADATA.names).to_pylist() == wanted.to_pylist()


def test_empty_partitions_and_fewer_rows_than_k(build: Build, opened: Open) -> None:
    few = np.repeat(clustered(6, seed=3), 4, axis=0)
    database = build(few, rows_per_partition=2)
    assert (database.partition_rows == 0).any()
    cluster = opened(database, actors=3, cpus_per_actor=HALF)
    queries = clustered(9, seed=4)
    assert_same(cluster.search(queries, 5), database, queries, 5)
    everything = cluster.search(queries, 100)
    assert_same(everything, database, queries, 100)
    assert len(everything) == 9 * 24


def test_hidden_rows_stay_hidden(database: Database, queries: Vectors, opened: Open) -> None:
    gone = np.unique(database.search(queries, 3).ids)
    without = database.without(gone)
    table = opened(without, actors=2, cpus_per_actor=HALF).search(queries, 10)
    assert_same(table, without, queries, 10)
    assert not np.isin(table[schema.IMAGE_ID], gone).any()
    assert len(table) == 10 * len(queries)


def test_replicas_of_a_small_database_take_turns(build: Build, vectors: Vectors, opened: Open) -> None:
    database = build(vectors[:500])
    cluster = opened(str(database.root.local_path("")), actors=4, replicas=2, cpus_per_actor=HALF)
    for query in vectors[:10]:
        assert_same(cluster.search(query[None], 4), database, query[None], 4)
    assert [status.calls for status in cluster.status()] == [5, 5]
    assert len({status.pid for status in cluster.status()}) == 2


@pytest.mark.parametrize("replicas", [1, 2])
def test_actors_killed_while_four_threads_search_cost_no_answer(
    database: Database, queries: Vectors, opened: Open, replicas: int
) -> None:
    cluster = opened(database, actors=2, replicas=replicas, cpus_per_actor=HALF)
    wanted = database.search(queries, 8).ids
    over = threading.Event()

    def stream(thread: int) -> int:
        rng = np.random.default_rng(thread)
        count = 0
        while not over.is_set():
            chosen = rng.choice(len(queries), 5)
            table = cluster.search(queries[chosen], 8)
            np.testing.assert_array_equal(table[schema.IMAGE_ID], wanted[chosen].reshape(-1))
            single = cluster.submit(queries[chosen[0]], 8).result()
            np.testing.assert_array_equal(single[schema.IMAGE_ID], wanted[chosen[0]])
            count += 1
        return count

    with ThreadPoolExecutor(4) as pool:
        streams = [pool.submit(stream, thread) for thread in range(4)]
        killed: set[int] = set()
        while len(killed) < 3 and not any(each.done() for each in streams):
            killed |= kill_one(cluster, len(killed))
            time.sleep(0.4)
        over.set()
        assert all(each.result() >= 1 for each in streams)
    assert len(killed) == 3
    wait_for(lambda: len(cluster.status()) == 2 * replicas)
    assert not killed & {status.pid for status in cluster.status()}


def wait_for(condition: Callable[[], bool], seconds: float = 20) -> None:
    """Until it holds; fails after so many seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_partitions_that_no_actor_can_open_again_are_named(
    database: Database, queries: Vectors, opened: Open
) -> None:
    cluster = opened(database, restart_timeout_s=10)
    folder = str(database.root.local_path(""))
    shutil.move(folder, f"{folder}-away")
    kill_one(cluster, 0)
    with pytest.raises(
        UserError, match=r"partitions 0, 1, 2, 3, 4, 5 of .*six: no actor can be reached.*missing"
    ):
        cluster.search(queries, 3)
    shutil.move(f"{folder}-away", folder)
    assert_same(cluster.search(queries, 3), database, queries, 3)


def test_single_queries_from_many_threads_go_in_batches_and_get_their_own_answers(
    database: Database, queries: Vectors, opened: Open
) -> None:
    cluster = opened(database, max_wait_ms=50, max_batch=32)
    wanted = database.search(queries, 6)
    with ThreadPoolExecutor(16) as pool:
        futures = list(pool.map(lambda query: cluster.submit(query, 6), queries))
    for i, future in enumerate(futures):
        table = future.result(20)
        assert table["query"].to_pylist() == [0] * 6
        assert table["rank"].to_pylist() == list(range(6))
        np.testing.assert_array_equal(table[schema.IMAGE_ID], wanted.ids[i])
        np.testing.assert_allclose(table["similarity"], wanted.similarities[i], atol=1e-6)
    [status] = cluster.status()
    assert status.queries == 50
    assert 2 <= status.calls <= 5
    other = cluster.submit(queries[0], 2, metadata=True)
    assert cluster.submit(queries[0], 3).result().column_names == RESULT_SCHEMA.names
    assert other.result().num_rows == 2
    assert "caption" in other.result().column_names


def test_an_actor_declares_the_bytes_of_its_partitions_and_computes_on_its_cpus(
    database: Database, opened: Open
) -> None:
    wait_for(lambda: ray.available_resources().get("CPU") == 2)
    before = ray.available_resources()["memory"]
    cluster = opened(database, cpus_per_actor=2)
    names = [name for number in range(6) for name in database.root.list(partition_folder(number))]
    declared = PROCESS_BYTES + sum(database.root.size(name) for name in names)
    assert [group.memory for group in cluster.groups] == [declared]
    wait_for(lambda: before - ray.available_resources()["memory"] == pytest.approx(declared, rel=0.01))
    assert ray.available_resources().get("CPU", 0) == 0
    assert [status.threads for status in cluster.status()] == [2]
    cluster.close()
    wait_for(lambda: ray.available_resources().get("CPU") == 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"actors": 3}, "3 actors in 1 replicas take 3 CPUs, the cluster has 2"),
        ({"cpus_per_actor": 0.0001, "replicas": 1000}, "bytes of memory, the cluster has"),
        ({"actors": 0}, "greater than or equal to 1"),
        ({"actor": 1}, "Extra inputs are not permitted"),
    ],
)
def test_settings_that_cannot_work_are_refused_at_once(
    database: Database, settings: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        Cluster.open(database, **settings)


def test_a_query_that_means_nothing_is_refused_before_anything_is_sent(
    database: Database, queries: Vectors, opened: Open
) -> None:
    cluster = opened(database)
    wrong = [
        (np.ones((1, 31)), 5),
        (np.zeros((1, 32)), 5),
        (np.full((1, 32), np.nan), 5),
        (queries, 0),
    ]
    for query, k in wrong:
        with pytest.raises(UserError) as here:
            database.search(query, k)
        with pytest.raises(UserError) as there:
            cluster.search(query, k)
        assert str(there.value) == str(here.value)
        with pytest.raises(UserError):
            cluster.submit(query[0], k)
    with pytest.raises(UserError):
        cluster.submit(queries, 5)
    with pytest.raises(UserError):
        cluster.search(queries, 5, recall=1.5)
    assert [status.calls for status in cluster.status()] == [0]


def test_a_closed_cluster_answers_what_was_submitted_and_refuses_the_rest(
    database: Database, queries: Vectors
) -> None:
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


def test_another_program_joins_the_ray_at_ray_address_and_leaves_it_as_it_was(
    database: Database, queries: Vectors
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
        [sys.executable, "-c", code, folder, repr(queries[:1].tolist())],
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
