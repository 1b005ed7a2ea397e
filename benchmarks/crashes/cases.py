"""Cases beyond single faults of a stage, all with the download: what was lost before, and must not be lost again.

Each case takes a prepared cluster and a generator of random numbers, and returns a text for each problem.
"""

import os
import signal
import tarfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.process import BaseProcess

import numpy as np

from benchmarks.crashes.data_set import ServedPictures
from benchmarks.crashes.faults import NODES, Command, CrashCluster, inject, worker_title
from benchmarks.crashes.outcome import CleanRun, differences, files_of
from retrieval.storage.manifest import read_manifest
from retrieval.storage.root import Root
from retrieval.storage.schema import PICTURE_SUFFIXES

STAGE = "download"
LIMIT_S = 300.0
"""A longer run counts as hanging."""
START_LOSSES = 5
"""Workers that are killed while they start; a shard alone may lose four."""
KILL_EVERY_S, KILLING_S = 30.0, 600.0
"""Time between two kills of workers, and of the kills of a case together."""
NO_STORE = "http://127.0.0.1:1"


@dataclass(frozen=True)
class CaseWorld:
    """What a case acts on. local, store: roots with a finished `filter`; clean: an undisturbed run of the download."""

    cluster: CrashCluster
    pictures: ServedPictures
    local: Root
    store: Root
    clean: CleanRun


Case = Callable[[CaseWorld, np.random.Generator], list[str]]


def changed_timeout(world: CaseWorld, rng: np.random.Generator) -> list[str]:
    """A changed timeout keeps a finished download."""
    problems = run(world, Command(STAGE, world.local.url))
    problems += run(world, Command(STAGE, world.local.url, "timeout"))
    return problems + differences(files_of(world.local, STAGE), world.clean.files, ignored=("manifest.json",))


def killed_retry(world: CaseWorld, rng: np.random.Generator) -> list[str]:
    """A retry is killed while earlier pictures are gone from the web; the next one completes it and keeps them."""
    paths = sorted(world.pictures.bodies)
    world.pictures.unavailable |= set(paths[::4])
    kept = dict(world.pictures.bodies)
    try:
        problems = run(world, Command(STAGE, world.local.url))
        before = stored_pictures(world.local)
        world.pictures.unavailable.clear()
        for path in set(paths) - set(paths[::4]):
            del world.pictures.bodies[path]
        driver = world.cluster.start(Command(STAGE, world.local.url, "retry"))
        driver.join(float(rng.uniform(0, world.clean.seconds)))
        driver.kill()
        world.cluster.wait_for_workers_to_end()
        problems += run(world, Command(STAGE, world.local.url, "retry"))
    finally:
        world.pictures.unavailable.clear()
        world.pictures.bodies |= kept
    after = stored_pictures(world.local)
    lost = sum(after.get(name) != data for name, data in before.items())
    return (
        problems
        + ([f"{lost} pictures of {len(before)} are lost or changed"] if lost else [])
        + ([] if len(after) > len(before) else ["the retry gained no picture"])
    )


def two_drivers(world: CaseWorld, rng: np.random.Generator) -> list[str]:
    """The same command a second time, while the first one runs: it is refused and disturbs nothing."""
    first = world.cluster.start(Command(STAGE, world.local.url))
    first.join(float(rng.uniform(0, world.clean.seconds / 2)))
    second = world.cluster.start(Command(STAGE, world.local.url))
    problems = [f"the first driver: {text}" for text in ended(first)]
    problems += [f"the second driver: {text}" for text in ended(second, code=2)]
    return problems + differences(files_of(world.local, STAGE), world.clean.files)


def sick_node(world: CaseWorld, rng: np.random.Generator) -> list[str]:
    """One node of three does not reach the store: the others do its shards."""
    world.cluster.add_node(AWS_ENDPOINT_URL=NO_STORE)
    try:
        problems = run(world, Command(STAGE, world.store.url, workers=NODES + 1))
    finally:
        world.cluster.remove_node()
    # The manifest has the number of workers.
    return problems + differences(files_of(world.store, STAGE), world.clean.files, ignored=("manifest.json",))


def losses_at_start(world: CaseWorld, rng: np.random.Generator) -> list[str]:
    """More workers are lost while they start than one shard may lose."""
    driver = world.cluster.start(Command(STAGE, world.local.url))
    killed: set[int] = set()
    while driver.is_alive() and len(killed) < START_LOSSES:
        for process in world.cluster.workers():
            if "run" not in worker_title(process) and len(killed) < START_LOSSES:
                with suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)
                    killed.add(process.pid)
        time.sleep(0.01)
    problems = ended(driver)
    problems += [] if len(killed) == START_LOSSES else [f"only {len(killed)} workers were killed"]
    return problems + differences(files_of(world.local, STAGE), world.clean.files)


def killed_workers(world: CaseWorld, rng: np.random.Generator) -> list[str]:
    """A worker is killed every KILL_EVERY_S for KILLING_S, while the stage is made again and again."""
    problems: list[str] = []
    started = time.monotonic()
    next_kill = started + KILL_EVERY_S
    while time.monotonic() < started + KILLING_S:
        world.local.delete(STAGE)
        driver = world.cluster.start(Command(STAGE, world.local.url))
        deadline = time.monotonic() + LIMIT_S
        while driver.is_alive() and time.monotonic() < deadline:
            if time.monotonic() > next_kill and inject("worker", world.cluster, driver, rng):
                next_kill += KILL_EVERY_S
            time.sleep(0.05)
        problems += ended(driver) + differences(files_of(world.local, STAGE), world.clean.files)
    return problems


CASES: dict[str, Case] = {
    "changed timeout": changed_timeout,
    "killed retry": killed_retry,
    "two drivers": two_drivers,
    "sick node": sick_node,
    "losses at start": losses_at_start,
    "killed workers": killed_workers,
}


def run(world: CaseWorld, command: Command) -> list[str]:
    """Run a command to its end. Returns a text if it failed."""
    return [f"{command.variant or 'the run'}: {text}" for text in ended(world.cluster.start(command))]


def ended(driver: BaseProcess, code: int = 0) -> list[str]:
    """Wait for a driver. Returns a text if it hangs or ends with another exit code."""
    driver.join(LIMIT_S)
    if driver.is_alive():
        driver.kill()
        return ["it hangs"]
    return [] if driver.exitcode == code else [f"exit code {driver.exitcode} instead of {code}"]


def stored_pictures(root: Root) -> dict[str, bytes]:
    """The pictures in the tars of a finished download, by name."""
    pictures = {}
    for name in read_manifest(root, STAGE).checksums():
        if name.endswith(".tar"):
            with root.local(name) as path, tarfile.open(path) as tar:
                for member in tar:
                    file = tar.extractfile(member)
                    if file and member.name.endswith(PICTURE_SUFFIXES):
                        pictures[member.name] = file.read()
    return pictures
