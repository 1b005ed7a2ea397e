"""Stages submitted to a real Ray cluster with its dashboard, and their Prometheus metrics."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from unittest.mock import patch
from urllib.request import urlopen

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ray.job_submission import JobSubmissionClient

from jobs.cluster.submit import Command, copy_upload, read_command, start_job, submit
from jobs.train import parse_arguments
from retrieval.errors import UserError
from retrieval.storage.manifest import read_manifest
from retrieval.storage.root import Root
from tests.fork_server import WORKERS_ARE_FORKS
from tests.jobs.free_ports import free_ports

REPOSITORY = Path(__file__).resolve().parents[3]
RECIPE = """
root = {root!r}
[filter]
metadata = {metadata!r}
nodes = "near"
"""


Metric = tuple[str, str]
"""Name, without the prefix of this project, and a tag."""


@dataclass(frozen=True)
class Cluster:
    """Addresses of the dashboard and of the metrics."""

    url: str
    metrics: str


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head node, started with `ray start` on free ports, with the resource `near`."""
    folder = tempfile.mkdtemp(prefix="ray-")  # not in pytest's folder: socket paths would be too long
    names = ("port", "dashboard-port", "dashboard-agent-listen-port", "metrics-export-port")
    ports = dict(zip((*names, "ray-client-server-port"), free_ports(5)))
    options = ["--num-cpus=2", "--object-store-memory=100000000", "--node-ip-address=127.0.0.1"]
    options += [f"--temp-dir={folder}", '--resources={"near": 1}']
    options += [f"--{name}={port}" for name, port in ports.items()]
    binaries = Path(sys.executable).parent
    head = subprocess.Popen(
        [str(binaries / "ray"), "start", "--head", "--block", *options],
        env={
            **{name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", WORKERS_ARE_FORKS)},
            "PATH": f"{binaries}:{os.environ['PATH']}",
            "RAY_AUTH_MODE": "disabled",
            "RAY_metrics_report_interval_ms": "500",
            "RAY_USAGE_STATS_ENABLED": "0",
        },
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        url = f"http://127.0.0.1:{ports['dashboard-port']}"
        agent = f"http://127.0.0.1:{ports['dashboard-agent-listen-port']}"
        metrics = f"http://127.0.0.1:{ports['metrics-export-port']}/metrics"
        for address in (f"{url}/api/jobs/", f"{agent}/api/local_raylet_healthz", metrics):
            wait_for(address, head)
        yield Cluster(url, metrics)
    finally:
        head.terminate()
        with suppress(subprocess.TimeoutExpired):
            head.wait(20)
        kill_group(head.pid)
        shutil.rmtree(folder, ignore_errors=True)


def kill_group(group: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def wait_for(url: str, head: subprocess.Popen[bytes]) -> None:
    for _ in range(1200):
        assert head.poll() is None, "the head node ended"
        try:
            urlopen(url, timeout=60).close()
            return
        except OSError:  # URLError too
            time.sleep(0.5)
    raise AssertionError(f"no response from {url}")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    (folder / "metadata").mkdir()
    rows = {
        "URL": [f"https://example.org/{number}.jpg" for number in range(20)],
        "TEXT": ["words"] * 20,
        "WIDTH": [1000] * 20,
        "HEIGHT": [900] * 10 + [600] * 10,
        "pwatermark": [0.1] * 20,
        "punsafe": [0.1] * 15 + [0.9] * 5,
    }
    pq.write_table(pa.table(rows), folder / "metadata" / "0.parquet")
    path = folder / "recipe.toml"
    path.write_text(RECIPE.format(root=str(folder / "run"), metadata=str(folder / "metadata")))
    return path


def another_root(recipe: Path, name: str) -> list[str]:
    """Words that give the recipe a root of its own: in one root, other settings need --remake."""
    return ["--set", f"root={recipe.parent / name}"]


def test_a_stage_on_the_cluster_has_its_log_exit_code_and_metrics(
    cluster: Cluster, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--set", "filter.min_edge=700", "--set", "filter.blocklist="]
    assert submit(cluster.url, read_command("filter", recipe, words)) == 0
    assert "filter: finished: 15 rows kept, 5 not (unsafe 5)" in capsys.readouterr().out
    manifest = read_manifest(Root(str(recipe.parent / "run")), "filter")
    assert (manifest.config["min_edge"], manifest.config["blocklist"]) == (700, "")
    assert [shard.rows for shard in manifest.shards] == [10, 5, 0]
    expected = {
        ("rows_total", 'part="select"'): 15.0,
        ("rows_not_kept_total", 'reason="unsafe"'): 5.0,
        ("shard_seconds_count", 'part="select"'): 1.0,
        ("shards_asked_total", 'part="select"'): 1.0,
        ("worker_peak_gb_count", 'part="select"'): 1.0,
    }
    deadline = time.monotonic() + 120
    while metrics_of(cluster, expected) != expected and time.monotonic() < deadline:
        time.sleep(0.2)  # processes report their metrics every half second
    assert metrics_of(cluster, expected) == expected
    [peak_gb] = metrics_of(cluster, [("worker_peak_gb_sum", 'part="select"')]).values()
    assert 0.01 < peak_gb < 2


def metrics_of(cluster: Cluster, wanted: Iterable[Metric]) -> dict[Metric, float]:
    """The values of the lines of the filter stage with these names and tags."""
    lines = urlopen(cluster.metrics, timeout=60).read().decode().splitlines()
    values = {}
    for name, tag in wanted:
        parts = (f"ray_rdm_{name}{{", tag, 'stage="filter"')
        for line in lines:
            if all(part in line for part in parts):
                values[name, tag] = float(line.split()[-1])
    return values


@pytest.fixture
def release_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """A function that jobs wait for before they begin."""
    file, entrypoint = tmp_path / "released", Command.entrypoint.fget

    def held(command: Command) -> str:
        return f"until [ -e {file} ]; do sleep 0.1; done; {entrypoint(command)}"

    monkeypatch.setattr(Command, "entrypoint", property(held))
    return file.touch


def test_a_running_job_is_followed_over_a_lost_connection_but_not_with_another_content_of_the_recipe(
    cluster: Cluster,
    recipe: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    release_jobs: Callable[[], None],
) -> None:
    words = ["--set", "filter.nodes=far", *another_root(recipe, "far")]
    command = read_command("filter", recipe, words)
    first = start_job(JobSubmissionClient(cluster.url), command)
    edited = recipe.with_name("edited.toml")
    edited.write_text(recipe.read_text() + "max_unsafe = 0.2\n")
    with pytest.raises(UserError, match=f"filter is running already as {first}, with another recipe"):
        submit(cluster.url, read_command("filter", edited, words))
    tail, connections = JobSubmissionClient.tail_job_logs, []

    async def disconnect_once(client: JobSubmissionClient, name: str) -> AsyncIterator[str]:
        connections.append(name)
        if len(connections) == 1:
            raise RuntimeError("WebSocket connection closed unexpectedly")
        release_jobs()
        async for text in tail(client, name):
            yield text

    with caplog.at_level("INFO"), patch.object(JobSubmissionClient, "tail_job_logs", disconnect_once):
        assert submit(cluster.url, command) == 2
    assert f"filter is running already as {first}" in caplog.text
    assert len(connections) >= 2
    assert "connection to the log lost" in caplog.text
    [line] = [line for line in capsys.readouterr().out.splitlines() if "error: " in line]
    assert "a worker takes CPU 1, far 0.001; no node of the cluster has all of that" in line


def test_the_upload_has_the_code_and_the_recipe_and_nothing_else(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text("root = 's3://bucket/run'")
    copy_upload({"recipe.toml": recipe}, tmp_path / "upload")
    assert {path.name for path in (tmp_path / "upload").iterdir()} == {
        "jobs",
        "pipeline",
        "recipe.toml",
        "retrieval",
        "trainer",
    }
    assert (tmp_path / "upload/recipe.toml").read_text() == recipe.read_text()
    assert (tmp_path / "upload/jobs/configs/laion2b.toml").is_file()
    assert not list((tmp_path / "upload").rglob("__pycache__"))


def test_an_address_without_a_cluster_is_an_error(recipe: Path) -> None:
    with pytest.raises(UserError, match=r"no Ray cluster responds at http://127.0.0.1:1\b"):
        submit("http://127.0.0.1:1", read_command("filter", recipe, []))


def test_a_cluster_that_denies_access_is_an_error(recipe: Path) -> None:
    class Denying(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(401)

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Denying) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        with pytest.raises(UserError, match=f"the Ray cluster at {address} denies access"):
            submit(address, read_command("filter", recipe, []))
        server.shutdown()


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("database", ["--name", "x"], "database cannot be submitted"),
        ("sample", ["--prompt", "a stag", "--out", "stag.png"], r"sample --prompt .* name files of this machine"),
        ("train", ["--hosts", "hosts.txt"], "train --hosts hosts.txt"),
        ("filter", ["--set", "root=runs/mine"], r"'runs/mine' is relative.* on this machine: make filter CLUSTER="),
        ("optout", ["--list", "missing.txt"], "'missing.txt' is no file of this machine"),
        ("status", ["--json", "--watch", "10"], "would not end"),
    ],
)
def test_a_command_that_needs_this_machine_is_not_submitted(
    recipe: Path, name: str, words: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        read_command(name, recipe, words)


@pytest.mark.parametrize("words", [["--remake"], ["--ray", "--remake"], ["--remake", "--ray"]])
def test_training_that_is_submitted_runs_on_the_workers_of_the_cluster(recipe: Path, words: list[str]) -> None:
    entrypoint = read_command("train", recipe, words).entrypoint
    assert entrypoint == "python -m jobs.train recipe.toml --ray --remake"
    arguments = parse_arguments(shlex.split(entrypoint)[3:])
    assert (arguments.ray, arguments.remake) == (True, True)


def test_a_stage_that_is_submitted_has_no_option_of_training(recipe: Path) -> None:
    assert read_command("filter", recipe, ["--remake"]).entrypoint == "python -m jobs.filter recipe.toml --remake"


def test_the_list_of_optout_is_uploaded_and_another_content_is_another_job(recipe: Path, tmp_path: Path) -> None:
    listed = tmp_path / "mine.txt"
    listed.write_text("example.org")
    first = read_command("optout", recipe, ["--erase", f"--list={listed}"])
    assert first.entrypoint == "python -m jobs.optout recipe.toml --list list.txt --erase"
    copy_upload(first.files, tmp_path / "upload")
    assert (tmp_path / "upload/list.txt").read_text() == "example.org"
    before = first.digest
    listed.write_text("example.net")
    assert read_command("optout", recipe, ["--erase", f"--list={listed}"]).digest != before
    from_store = read_command("optout", recipe, ["--list", "s3://lists/mine.txt"])
    assert from_store.entrypoint == "python -m jobs.optout recipe.toml --list s3://lists/mine.txt"
    assert [*from_store.files] == ["recipe.toml"]


def dry_make(*words: str) -> subprocess.CompletedProcess[str]:
    """The commands that make would run, without its installation."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(
        ["make", "-n", "-o", "install", *words],
        cwd=REPOSITORY,
        env=environment,  # if make runs these tests, its flags must not reach this make
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("word", ["CLUSTER=http://head:8265", "RAY_ADDRESS=http://head:8265"])
def test_make_submits_the_command_that_it_would_run_locally(word: str) -> None:
    for target, own in (("embed", ""), ("status", ""), ("optout", '--list "a.txt"')):
        done = dry_make(target, "RECIPE=a b.toml", "LIST=a.txt", "ARGS=--set embed.batch_size=3", word)
        assert done.stdout.split()[1:5] == ["-m", "jobs.cluster.submit", '"http://head:8265"', target]
        assert done.stdout.strip().endswith(f"a b.toml {own} --set embed.batch_size=3")
        assert f" -m jobs.{target} " in dry_make(target, word, "CLUSTER=", "RAY_ADDRESS=").stdout


def test_make_refuses_a_cluster_for_what_runs_on_this_machine_only() -> None:
    for target in ("database", "import", "finetune", "convert", "explore", "paper", "view", "capacity", "demo"):
        done = dry_make("filter", target, "CLUSTER=http://head:8265")
        assert (done.returncode, done.stdout) == (2, "")
        assert f"make {target} runs on this machine only" in done.stderr
        assert dry_make(target, "RAY_ADDRESS=http://head:8265").returncode == 0
    for target in ("help", "test", "docs", "bench-step", "gpu-wheels"):
        assert dry_make(target, "CLUSTER=http://head:8265").returncode == 0
