"""Bytes that the loader reads for each byte that training uses: from a store by size of the cache, and from a disk.

Reads a generated training set; counts the bytes of every file that is read. The counts do not depend on the machine.
"""

import io
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO

from benchmarks.training.training_data import Extent, prepare, training_recipe
from jobs.reporting.tables import markdown_table
from retrieval.storage.root import Root
from trainer.data.images import ImageTar, Members, stored_members
from trainer.data.loader import Loader
from trainer.data.plan import make_plan
from trainer.model.autoencoder import Autoencoder
from trainer.model.recipe import AutoencoderConfig

EXTENT = Extent(shards=16, rows=48, k=8, dim=768, size=64, factor=16, channels=4, edge=192)
TINY = Extent(shards=4, rows=16, k=2, dim=8, size=32, factor=16, channels=4, edge=64)
EPOCHS, BATCH = 3, 16
SHARES = (0.375, 0.5, 0.75, 1.0, 2.0)
"""Sizes of the cache over that of the data."""

PAGE = """**Bytes fetched from an object store** for each byte of pictures and neighbors that training used, over
{epochs} epochs of {shards} shards, {lanes} of them open at a time (counted, the same on every machine):

{caches}

A cache that holds the data fetches each shard once, so {epochs} epochs need a third of a byte for each byte used.

**Bytes read from a disk** for each byte of the pictures of a shard, in opening its tar and reading all pictures:
{stored:.3f} with the offsets that `download` stores, {scanned:.3f} without; in opening alone {opened:.3f} and
{opened_scanned:.3f}. Read-ahead of a network disk multiplies the bytes of the scan."""


class CountedRoot(Root):
    """A root that counts the bytes that are read from its files."""

    fetched = 0

    def open(self, name: str) -> BinaryIO:
        """A finished file, counted."""
        with super().open(name) as file:
            return _CountedFile(self, file.read())


class _CountedFile(io.BytesIO):
    def __init__(self, root: CountedRoot, content: bytes) -> None:
        super().__init__(content)
        self._root = root

    def read(self, size: int | None = -1) -> bytes:
        data = super().read(size)
        self._root.fetched += len(data)
        return data


def measure(folder: Path, extent: Extent) -> dict[str, Any]:
    """Bytes read per byte used, for each size of the cache and from a disk. folder: for the training set."""
    local, store = Root(folder), CountedRoot("memory://bytes-fetched")
    autoencoder = prepare(local, extent)
    for folder_name in ("neighbors", "download"):
        for name in local.list(folder_name):
            store.write_bytes(name, local.local_path(name).read_bytes())
    used = sum(size for name in extent.names for _, size in _members(local, name).values())
    used = EPOCHS * (used + 2 * extent.shards * extent.rows * extent.k * extent.dim)
    data, _ = _epochs(store, extent, autoencoder, 0.0)
    caches = []
    for share in SHARES:
        _, fetched = _epochs(store, extent, autoencoder, share * data / 1e9)
        caches.append({"share": share, "fetched": fetched / used})
    return {"epochs": EPOCHS, "shards": extent.shards, "lanes": extent.shards // 4, "caches": caches} | _disk(
        local, extent
    )


def _epochs(store: CountedRoot, extent: Extent, autoencoder: AutoencoderConfig, cache_gb: float) -> tuple[int, int]:
    """Train EPOCHS epochs with an empty cache: bytes of the copies at the end, bytes fetched."""
    with TemporaryDirectory() as cache:
        train: dict[str, Any] = {"cache_folder": cache, "cache_gb": cache_gb, "prefetch_batches": 1, "workers": 1}
        train |= {"interleaved_shards": extent.shards // 4}
        recipe = training_recipe(extent, autoencoder, BATCH, **train)
        plan = make_plan(recipe, store, Autoencoder.load(autoencoder, "cpu"))
        store.fetched = 0
        for _ in Loader(plan, store, 0, 1).batches(0, EPOCHS * extent.shards * extent.rows // BATCH):
            pass
        return sum(path.stat().st_size for path in Path(cache).iterdir()), store.fetched


def _disk(root: Root, extent: Extent) -> dict[str, float]:
    """Bytes read from the files of a shard over those of its pictures, with stored offsets and with a scan."""
    name = extent.names[0]
    used = sum(size for _, size in _members(root, name).values())
    ids = [*_members(root, name)]
    values: dict[str, float] = {}
    for suffix, opened in (("stored", "opened"), ("scanned", "opened_scanned")):
        before = _bytes_read()
        members = _members(root, name) if suffix == "stored" else None
        tar = ImageTar(root.local_path(_tar(name)), members)
        values[opened] = (_bytes_read() - before) / used
        for image_id in ids:
            tar.read(image_id)
        values[suffix] = (_bytes_read() - before) / used
        tar.close()
    return values


def _members(root: Root, name: str) -> Members:
    return stored_members(root, _tar(name))


def _tar(name: str) -> str:
    return f"download/train/{name}.tar"


def _bytes_read() -> int:
    """Bytes that this process has read from files."""
    return int(Path("/proc/self/io").read_text().split()[1])


def page(result: dict[str, Any]) -> str:
    """The section of the page as Markdown."""
    rows = [[f"{cache['share']:g}", f"{cache['fetched']:.2f}"] for cache in result["caches"]]
    table = markdown_table(["size of the cache / size of the data", "bytes fetched per byte used:"], rows)
    return PAGE.format(**result | {"caches": table})
