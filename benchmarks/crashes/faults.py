"""What goes wrong: a driver, a worker or a whole node killed, a disk filled, a store cut.

Each fault strikes a stage that runs on a Ray cluster of this process's own, and can be mended. Touches
no process but the cluster's and its drivers, no disk but one of its own.
"""

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

import numpy as np
import psutil
import ray
from ray.cluster_utils import Cluster

from benchmarks.crashes.store import Proxy
from benchmarks.crashes.world import World
from retrieval.errors import UserError
from retrieval.storage.root import Root

KINDS = ("driver", "worker", "node", "disk", "store")
NODES = 2
"""The head, which no cluster outlives, and one that can be lost."""
DISK_MB = 64
SETTLE_S = 30.0
"""Longest wait for a killed driver's workers to end."""
DRIVER: ForkServerContext = multiprocessing.get_context("forkserver")


def drive(address: str, world: World, stage: str, root: str, begun: object) -> None:
    """Run a stage, as `python -m jobs.<stage>` does. Ends with 2 for a UserError."""
    log = os.open(world.folder / "driver.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    ray.init(address=address, log_to_driver=False, logging_level="error")
    begun.set()  # type: ignore[attr-defined]
    try:
        world.run(stage, Root(root), NODES)
    except UserError as error:
        os.write(2, f"{stage}: {error}\n".encode())
        raise SystemExit(2) from None


@dataclass
class Bench:
    """A cluster with two nodes of one worker each, and what faults need to strike it."""

    cluster: Cluster
    world: World
    proxy: Proxy
    disk: Path
    nodes: list[object] = field(default_factory=list)

    def start(self, stage: str, root: Root) -> BaseProcess:
        """Start a driver; returns once it reached the cluster and begins the stage."""
        begun = DRIVER.Event()
        arguments = (self.cluster.address, self.world, stage, root.url, begun)
        driver = DRIVER.Process(target=drive, args=arguments, daemon=True)
        driver.start()
        while not begun.wait(0.1) and driver.is_alive():
            pass
        return driver

    def workers(self) -> list[psutil.Process]:
        """The processes that make shards, on all nodes."""
        found = []
        for node in self.cluster.list_all_nodes():
            [raylet] = node.all_processes["raylet"]
            with suppress(psutil.NoSuchProcess):
                found += psutil.Process(raylet.process.pid).children()
        return [process for process in found if _is_worker(process)]

    def settled(self) -> bool:
        """Wait until no process makes shards; False if some still does after SETTLE_S."""
        deadline = time.monotonic() + SETTLE_S
        while self.workers():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.1)
        return True

    def add_node(self) -> None:
        """Give the cluster another node, of one worker."""
        self.nodes.append(self.cluster.add_node(num_cpus=1))


def _is_worker(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return any("_Worker" in word for word in process.cmdline()[:1])
    return False


@contextmanager
def bench(world: World, proxy: Proxy, disk: Path) -> Iterator[Bench]:
    """A cluster that lasts while the block does. disk: the folder that `disk` fills."""
    os.environ |= {"RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1", "AWS_MAX_ATTEMPTS": "2"}
    DRIVER.set_forkserver_preload(["benchmarks.crashes.faults"])
    os.environ["RAY_TMPDIR"] = str(world.folder)  # on no disk that is filled
    head = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": 1 << 27}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    made = Bench(cluster, world, proxy, disk)
    try:
        made.add_node()
        yield made
    finally:
        cluster.shutdown()


@contextmanager
def small_disk(folder: Path) -> Iterator[Path | None]:
    """A file system of its own in memory; None where this process may not mount one."""
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "tmpfs", str(folder)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        yield None
        return
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def strike(
    kind: str, bench: Bench, driver: BaseProcess, rng: np.random.Generator
) -> Callable[[], object] | None:
    """Do it. Returns what mends it, or None where there was nothing to strike."""
    if kind == "driver":
        driver.kill()
        return driver.join
    if kind == "worker":
        return _kill_worker(bench, driver, rng)
    if kind == "node":
        bench.cluster.remove_node(bench.nodes.pop(), allow_graceful=False)
        return bench.add_node
    if kind == "disk":
        return _fill(bench.disk / "ballast")
    bench.proxy.cut()
    return bench.proxy.mend


def _kill_worker(bench: Bench, driver: BaseProcess, rng: np.random.Generator) -> Callable[[], object] | None:
    while driver.is_alive():
        if workers := bench.workers():
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
