"""Bytes that ranks read from cold shards for each byte of pictures and neighbors that training used.

`python -m benchmarks.training.cold_reads FOLDER RANK KIB` is a rank, a process of its own: it reads an epoch and prints
its counts. With KIB = 0 it counts what the system read from the disk, else what a network disk transfers in blocks of
so many KiB.
"""

import io
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, BinaryIO, cast
from unittest import mock

from benchmarks.common.page_cache import evict
from benchmarks.common.report import REPOSITORY
from benchmarks.training.training_data import Extent, prepare, training_recipe
from jobs.reporting.hardware import hardware
from jobs.reporting.tables import markdown_table
from retrieval.storage.root import Root
from trainer.data.images import stored_members
from trainer.data.loader import Loader
from trainer.data.plan import make_plan
from trainer.model.autoencoder import Autoencoder

RANKS = 2
BATCH = 16
KIB = (0, 128, 1024)
"""Cases: the disk of this machine, then a network disk by the size of its blocks."""
REQUEST_BYTES = 1 << 20
LATENCY_S = 0.002
GOAL = 1.1

PAGE = """**Bytes read from cold shards** for each byte of pictures and neighbors that training used, in an epoch, by
{ranks} ranks in processes of their own (goal: at most {goal}), on {hardware}:

{table}

The network disk is a stand-in: it transfers whole blocks, and each request of at most 1 MiB takes {latency_ms:g} ms.
A rank shares no blocks with the other, as on another machine, and keeps those that it has read."""


class NetworkDisk:
    """Counts the bytes that reads of a process would transfer from a network disk, and waits as they would."""

    def __init__(self, block_bytes: int) -> None:
        self.bytes_read = 0
        self._block_bytes = block_bytes
        self._blocks: set[tuple[int, int]] = set()
        self._lock = threading.Lock()

    def read(self, file: int, offset: int, size: int) -> None:
        """Transfer the blocks of a range of an open file that were not read before."""
        state, edge = os.fstat(file), self._block_bytes
        numbers = range(offset // edge, -(-min(offset + size, state.st_size) // edge))
        with self._lock:
            blocks = {(state.st_ino, number) for number in numbers} - self._blocks
            self._blocks |= blocks
            count = sum(min(edge, state.st_size - number * edge) for _, number in blocks)
            self.bytes_read += count
        time.sleep(LATENCY_S * -(-count // REQUEST_BYTES))


class _NetworkRoot(Root):
    """A local root whose files are on a network disk."""

    def __init__(self, folder: Path, disk: NetworkDisk) -> None:
        super().__init__(folder)
        self._disk = disk

    def open(self, name: str) -> BinaryIO:
        """A finished file."""
        return cast(BinaryIO, _NetworkFile(self.local_path(name), self._disk))


class _NetworkFile(io.FileIO):
    def __init__(self, path: Path, disk: NetworkDisk) -> None:
        super().__init__(path)
        self._disk = disk

    def read(self, size: int | None = -1) -> bytes:
        wanted = os.fstat(self.fileno()).st_size if size is None or size < 0 else size
        self._disk.read(self.fileno(), self.tell(), wanted)
        return super().read(wanted) or b""


def measure(folder: Path, extent: Extent, kib: tuple[int, ...] = KIB) -> dict[str, Any]:
    """Bytes read per byte used in each case. folder: for the training set."""
    prepare(Root(folder), extent)
    cases = [_case(folder, size) for size in kib]
    return {"hardware": hardware(), "read_ahead_kib": _read_ahead_kib(folder), "cases": cases}


def _case(folder: Path, kib: int) -> dict[str, float]:
    evict(folder)
    command = [sys.executable, "-m", "benchmarks.training.cold_reads", str(folder)]
    ranks = [
        subprocess.Popen([*command, str(rank), str(kib)], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
        for rank in range(RANKS)
    ]
    outputs = [rank.communicate()[0] for rank in ranks]
    assert not any(rank.returncode for rank in ranks), f"a rank of {command} failed"
    counts = [json.loads(output) for output in outputs]
    return {"kib": kib, "ratio": sum(count["read"] for count in counts) / sum(count["used"] for count in counts)}


def read_epoch(folder: Path, rank: int, kib: int) -> dict[str, int]:
    """Read the share of a rank in an epoch: bytes read, and bytes used."""
    disk = NetworkDisk(kib << 10)
    root = _NetworkRoot(folder, disk) if kib else Root(folder)
    extent = Extent(**root.read_json("extent.json"))
    autoencoder = prepare(root, extent)
    lanes = max(RANKS, extent.shards // 2)
    recipe = training_recipe(extent, autoencoder, global_batch=BATCH, interleaved_shards=lanes)
    plan = make_plan(recipe, root, Autoencoder.load(autoencoder, "cpu"))
    before, disk.bytes_read = _bytes_from_disk(), 0
    pread = os.pread

    def counted(file: int, size: int, offset: int) -> bytes:
        disk.read(file, offset, size)
        return pread(file, size, offset)

    with mock.patch("trainer.data.images.os.pread", counted if kib else pread):
        batches = Loader(plan, root, rank, RANKS).batches(0, extent.shards * extent.rows // BATCH)
        ids = [image_id for batch in batches for image_id in batch.image_ids.tolist()]
    read = disk.bytes_read if kib else _bytes_from_disk() - before
    members = {}
    for name in extent.names:
        members |= stored_members(Root(folder), f"download/train/{name}.tar")
    return {"read": read, "used": sum(members[image_id][1] + 2 * extent.k * extent.dim for image_id in ids)}


def _bytes_from_disk() -> int:
    """Bytes that the system has read from disks for this process."""
    return int(Path("/proc/self/io").read_text().split("\nread_bytes: ")[1].split()[0])


def _read_ahead_kib(folder: Path) -> int:
    """The read-ahead of the disk of a folder; 0 if it is not known."""
    device = folder.stat().st_dev
    path = Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb")
    return int(path.read_text()) if path.exists() else 0


def page(result: dict[str, Any]) -> str:
    """The section of the page as Markdown."""
    ahead = f", read-ahead of {result['read_ahead_kib']:,} KiB" if result["read_ahead_kib"] else ""
    rows = [
        [
            f"a network disk, blocks of {case['kib']:,} KiB (counted)" if case["kib"] else f"local{ahead} (measured)",
            f"{case['ratio']:.3f}",
        ]
        for case in result["cases"]
    ]
    table = markdown_table(["disk", "bytes read per byte used:"], rows)
    return PAGE.format(ranks=RANKS, goal=GOAL, table=table, latency_ms=LATENCY_S * 1000, hardware=result["hardware"])


if __name__ == "__main__":
    print(json.dumps(read_epoch(Path(sys.argv[1]), *map(int, sys.argv[2:]))))
