"""Faults for the crash tests: a killed driver, worker or node, a full disk, an unreachable store.

Each fault is injected into a stage on a Ray cluster that this module starts, and can be repaired. Only the
processes of this cluster and its drivers are killed; only a small separate disk is filled.
"""

import logging
import multiprocessing
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray
from ray.cluster_utils import Cluster

from benchmarks.crashes.data_set import SmallDataSet
from benchmarks.crashes.store import Proxy
from pipeline.runtime import shard_queue
from retrieval.errors import UserError
from retrieval.storage.root import Root

FAULTS = ("driver", "worker", "node", "disk", "store")
NODES = 2
"""The head, without which the cluster ends, and one node that can be lost."""
DISK_MB = 64
PAUSE_S = 1.0
"""First pause of a worker after a failure, instead of 5 s."""
SETTLE_S = 120.0
"""Longest wait for the workers of a killed driver to end."""
DRIVER: ForkServerContext = multiprocessing.get_context("forkserver")


@dataclass(frozen=True)
class Command:
    """What a driver runs. variant: of `SmallDataSet.run`; workers: for the stage."""

    stage: str
    root: str
    variant: str = ""
    workers: int = NODES


def run_driver(address: str, data_set: SmallDataSet, command: Command, started: object) -> None:
    """Run a stage, as `python -m jobs.<stage>` does, with shorter pauses. Exits with the exit code of a UserError."""
    log = os.open(data_set.folder / "driver.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    shard_queue.PAUSE_S = PAUSE_S
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s  %(name)s: %(message)s", force=True)
    started.set()  # type: ignore[attr-defined]
    try:
        data_set.run(command.stage, Root(command.root), command.workers, command.variant)
    except UserError as error:
        os.write(2, f"{command.stage}: {error}\n".encode())
        raise SystemExit(error.exit_code) from None


@dataclass
class CrashCluster:
    """A cluster with two nodes of one worker each, and the resources that faults act on."""

    ray_cluster: Cluster
    data_set: SmallDataSet
    proxy: Proxy
    disk: Path
    nodes: list[Any] = field(default_factory=list)

    def start(self, command: Command) -> BaseProcess:
        """Start a driver; returns when it is connected to the cluster and starts the stage."""
        started = DRIVER.Event()
        arguments = (self.ray_cluster.address, self.data_set, command, started)
        driver = DRIVER.Process(target=run_driver, args=arguments, daemon=True)
        driver.start()
        while not started.wait(0.1) and driver.is_alive():
            pass
        return driver

    def workers(self) -> list[psutil.Process]:
        """The worker processes on all nodes."""
        workers = []
        for node in self.ray_cluster.list_all_nodes():
            [raylet] = node.all_processes["raylet"]
            with suppress(psutil.NoSuchProcess):
                workers += psutil.Process(raylet.process.pid).children()
        return [process for process in workers if worker_title(process)]

    def wait_for_workers_to_end(self) -> bool:
        """Wait until no worker is left; False if one is left after SETTLE_S."""
        deadline = time.monotonic() + SETTLE_S
        while self.workers():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.1)
        return True

    def add_node(self, **environment: str) -> None:
        """Add a node with one worker. environment: variables of its processes."""
        self.nodes.append(self.ray_cluster.add_node(num_cpus=1, env_vars=environment))

    def remove_node(self) -> None:
        """Remove the node that was added last, with all its processes."""
        self.ray_cluster.remove_node(self.nodes.pop(), allow_graceful=False)


def worker_title(process: psutil.Process) -> str:
    """The title of a worker's process, with the method that it runs; empty for other processes."""
    with suppress(psutil.NoSuchProcess):
        return next((word for word in process.cmdline()[:1] if "RemoteWorker" in word), "")
    return ""


@contextmanager
def crash_cluster(data_set: SmallDataSet, proxy: Proxy, disk: Path) -> Iterator[CrashCluster]:
    """A cluster that is shut down when the block ends. disk: the folder that the fault `disk` fills."""
    os.environ |= {"RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1", "AWS_MAX_ATTEMPTS": "2"}
    os.environ["RAY_TMPDIR"] = str(data_set.folder)  # not on the disk that is filled
    head = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": 1 << 27}
    ray_cluster = Cluster(initialize_head=True, head_node_args=head)
    cluster = CrashCluster(ray_cluster, data_set, proxy, disk)
    try:
        cluster.add_node()
        yield cluster
    finally:
        ray_cluster.shutdown()


@contextmanager
def small_disk(folder: Path) -> Iterator[Path | None]:
    """A small file system in memory; None if this process may not mount one."""
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "tmpfs", str(folder)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        yield None
        return
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def inject(
    kind: str, cluster: CrashCluster, driver: BaseProcess, rng: np.random.Generator
) -> Callable[[], object] | None:
    """Inject a fault. Returns a function that repairs it, or None if the stage had already ended."""
    if kind == "driver":
        driver.kill()
        return driver.join
    if kind == "worker":
        return _kill_worker(cluster, driver, rng)
    if kind == "node":
        cluster.remove_node()
        return cluster.add_node
    if kind == "disk":
        return _fill(cluster.disk / "ballast")
    cluster.proxy.cut()
    return cluster.proxy.restore


def _kill_worker(cluster: CrashCluster, driver: BaseProcess, rng: np.random.Generator) -> Callable[[], object] | None:
    while driver.is_alive():
        if workers := cluster.workers():
            with suppress(ProcessLookupError):
                os.kill(workers[int(rng.integers(len(workers)))].pid, signal.SIGKILL)
                return lambda: None
        time.sleep(0.05)
    return None


def _fill(ballast: Path) -> Callable[[], object]:
    with suppress(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 16))
    return ballast.unlink
