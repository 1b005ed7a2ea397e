"""Training data of an object store: copies within a limit, shared by ranks, opened ahead of their need."""

import os
import shutil
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import pytest
import torch

from benchmarks.crashes.store import Store
from retrieval.errors import NodeError, UserError
from retrieval.file_cache import FileCache, NoRoomError
from retrieval.storage.root import Root
from tests.trainer.training_set import NAMES, make_recipe, plan_of, write_tars, write_training_set
from trainer.data import shards
from trainer.data.loader import WAIT_S, Loader
from trainer.model.autoencoder import Autoencoder

STEPS = 12
FIELDS = ("inputs", "context", "timesteps", "posterior_noise", "noise")


@pytest.fixture(scope="module")
def stored(autoencoder_folder: str, object_store: Store) -> Root:
    """The training set with latents and images in a bucket."""
    root = Root(object_store.url("training-set"))
    write_training_set(root, Autoencoder.load(make_recipe(autoencoder_folder).autoencoder, "cpu").identity)
    write_tars(root)
    return root


@pytest.fixture
def memory(request: pytest.FixtureRequest) -> Root:
    return Root(f"memory://{request.node.name}")


def size_of(folder: Path) -> int:
    """Bytes of the files in a folder, from which a thread may delete some meanwhile."""
    size = 0
    for path in folder.iterdir():
        with suppress(FileNotFoundError):
            size += path.stat().st_size
    return size


@pytest.mark.parametrize("source", ["latents", "images"])
def test_batches_of_a_bucket_equal_those_of_a_disk_also_with_a_cache_smaller_than_the_data(
    stored: Root, training_set: Root, autoencoder_folder: str, tmp_path: Path, source: str
) -> None:
    write_tars(training_set)
    sizes = [0]
    for name in ("large", "small"):
        folder, max_bytes = tmp_path / name, sizes[-1] * 4 // 5
        changes = {"source": source, "cache_folder": str(folder), "cache_gb": max_bytes / 1e9, "workers": 1}
        plan, largest = plan_of(autoencoder_folder, stored, **changes), 0
        for rank in (0, 1):  # they share the folder
            remote, local = (Loader(plan, root, rank, 2).batches(0, STEPS) for root in (stored, training_set))
            for batch, expected in zip(remote, local, strict=True):
                assert batch.image_ids.tolist() == expected.image_ids.tolist()
                assert all(torch.equal(getattr(batch, name), getattr(expected, name)) for name in FIELDS)
                largest = max(largest, size_of(folder))
        sizes.append(largest)
    assert sizes[1] / 2 < sizes[2] <= sizes[1] * 4 // 5


def test_a_cache_of_one_shard_is_enough_for_several_threads_that_need_different_shards(
    memory: Root, training_set: Root, autoencoder_folder: str, tmp_path: Path
) -> None:
    write_training_set(memory, Autoencoder.load(make_recipe(autoencoder_folder).autoencoder, "cpu").identity)
    # The largest shard has tables of 9,530 and 67,832 bytes.
    changes = {"cache_folder": str(tmp_path / "cache"), "cache_gb": 78e-6, "workers": 3}
    plan = plan_of(autoencoder_folder, memory, **changes)
    for batch, local in zip(Loader(plan, memory, 0, 1).batches(0, 2), Loader(plan, training_set, 0, 1).batches(0, 2)):
        assert torch.equal(batch.inputs, local.inputs)
        assert size_of(tmp_path / "cache") <= 78_000


def test_shards_are_opened_ahead_in_the_order_of_need_up_to_a_number(
    stored: Root, autoencoder_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"cache_folder": str(tmp_path), "interleaved_shards": 1, "prefetch_batches": 1, "workers": 1}
    loader = Loader(plan_of(autoencoder_folder, stored, **changes), stored, 0, 1)
    expected = [number for _, number in loader.openings(0, STEPS)]
    opened: list[int] = []
    monkeypatch.setattr(loader, "_ahead", 1)
    monkeypatch.setattr(loader._shards, "_open", open_shard := Recorder(loader._shards._open, opened))
    batches = loader.batches(0, STEPS)
    next(batches)
    with open_shard.changed:
        # The first is needed at once.
        assert open_shard.changed.wait_for(lambda: len(opened) >= 2, timeout=300)
        assert not open_shard.changed.wait_for(lambda: len(opened) > 2, timeout=3 * WAIT_S)
    assert set(opened) == set(expected[:2])
    list(batches)
    assert opened[2] == expected[2]


class Recorder:
    """Records the numbers of the shards that are opened."""

    def __init__(self, open_shard: Any, opened: list[int]) -> None:
        self.open_shard, self.opened, self.changed = open_shard, opened, threading.Condition()

    def __call__(self, number: int) -> Any:
        with self.changed:
            self.opened.append(number)
            self.changed.notify_all()
        return self.open_shard(number)


def test_tables_of_a_store_are_mapped_and_not_held_in_memory(
    stored: Root, autoencoder_folder: str, tmp_path: Path
) -> None:
    shard = shards.LatentShard(
        FileCache(stored, str(tmp_path)), plan_of(autoencoder_folder, stored).training_set, NAMES[0]
    )
    lines = Path("/proc/self/maps").read_text().splitlines()
    spans = [line.split()[0].split("-") for line in lines if str(tmp_path) in line]
    for array in (shard.context, shard._moments):
        first, end = array.ctypes.data, array.ctypes.data + array.nbytes
        assert any(int(start, 16) <= first and end <= int(stop, 16) for start, stop in spans)


def test_the_folder_and_the_limit_of_the_root_count_only_as_a_pair(tmp_path: Path) -> None:
    root = Root("memory://pair", cache=(str(tmp_path / "root"), 1e-6))
    cache = FileCache(root)
    assert (cache.folder, cache.max_bytes) == (tmp_path / "root", 1000)
    cache = FileCache(root, str(tmp_path / "own"))
    assert cache.folder == tmp_path / "own"
    assert cache.max_bytes > 1000
    assert FileCache(root, max_gb=2e-6).folder != tmp_path / "root"


def test_a_file_larger_than_the_cache_is_an_error_and_open_files_are_not_deleted(memory: Root, tmp_path: Path) -> None:
    for name in "abc":
        memory.write_bytes(name, name.encode() * 1000)
    with (
        pytest.raises(NodeError, match=r"1,000 bytes is larger than the cache of 999 bytes\. Raise cache_gb.*TMPDIR"),
        FileCache(memory, str(tmp_path / "small"), 999e-9).local("a"),
    ):
        pass
    others = [tmp_path / "two/notes.txt", tmp_path / "two/folder/notes.txt", tmp_path / "two/.partial-x"]
    for path in others:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("not a copy of the cache")
    files = FileCache(memory, str(tmp_path / "two"), 2000e-9)
    with files.local("a") as a, files.local("b"):
        with pytest.raises(NoRoomError, match=r"open files use 2,000 of 2,000 bytes"), files.local("c"):
            pass
        assert a.read_bytes() == b"a" * 1000
    with files.local("a"):
        pass
    with files.local("c"):
        # b was used less recently than a.
        copies = {path for path in (tmp_path / "two").rglob("*") if path.is_file()} - {*others}
        assert {path.read_bytes()[:1] for path in copies} == {b"a", b"c"}
    assert all(path.exists() for path in others)


def test_processes_that_need_a_file_at_once_copy_it_once(
    memory: Root, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory.write_bytes("shard.tar", bytes(1000))
    read, opened = memory.open, list[str]()

    def recorded(name: str) -> BinaryIO:
        opened.append(name)
        return read(name)

    monkeypatch.setattr(memory, "open", recorded)
    caches = [FileCache(memory, str(tmp_path), 1e-6) for _ in range(4)]
    # What a killed process left behind does not count.
    (tmp_path / f".partial-1000-{32 * '0'}.tar").write_bytes(bytes(500))

    def content(cache: FileCache) -> bytes:
        with cache.local("shard.tar") as path:
            return path.read_bytes()

    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(content, caches)) == {bytes(1000)}
    assert opened == ["shard.tar"]
    assert len(list(tmp_path.iterdir())) == 1


def test_a_new_version_of_a_file_is_copied_again(stored: Root, tmp_path: Path) -> None:
    files = FileCache(stored, str(tmp_path))
    for content in (b"first", b"other"):
        stored.write_bytes("versions/a.tar", content)
        with files.local("versions/a.tar") as path:
            assert path.read_bytes() == content


def test_a_copy_that_differs_from_its_record_is_an_error_and_is_not_kept(memory: Root, tmp_path: Path) -> None:
    record = memory.write_bytes("a.npy", b"right")
    files = FileCache(memory, str(tmp_path), records={"a.npy": record})
    for damaged in (b"wrong", b"righ"):
        memory.write_bytes("a.npy", damaged)
        named = pytest.raises(NodeError, match=rf"a\.npy: the copy has {len(damaged)} bytes and .*, expected 5 and")
        with named, files.local("a.npy"):
            pass
        assert list(tmp_path.iterdir()) == []
    memory.write_bytes("a.npy", b"right")
    with files.local("a.npy") as path:
        assert path.read_bytes() == b"right"


def test_a_record_that_names_a_file_outside_the_cache_is_an_error(memory: Root, tmp_path: Path) -> None:
    record = replace(memory.write_bytes("a.npy", b"1"), sha256="../private")
    (tmp_path / "private.npy").write_bytes(b"2")
    files = FileCache(memory, str(tmp_path / "cache"), records={"a.npy": record})
    with pytest.raises(UserError, match=r"a\.npy: .* '\.\./private', expected 64 hex digits"), files.local("a.npy"):
        pass


def test_the_default_folder_is_refused_if_others_own_it_or_can_write_it(
    memory: Root, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = FileCache(memory).folder
    assert (folder.parent, folder.stat().st_mode & 0o777) == (tmp_path, 0o700)
    folder.chmod(0o770)
    with pytest.raises(NodeError, match=r"others can write it.* Remove it, or set .* TMPDIR"):
        FileCache(memory)
    folder.rename(tmp_path / "other")
    (tmp_path / "other").chmod(0o700)
    folder.symlink_to(tmp_path / "other")
    with pytest.raises(NodeError, match="it is a link"):
        FileCache(memory)
    monkeypatch.setattr(os, "getuid", lambda: 123_456)
    (tmp_path / "laion-rdm-123456").mkdir(0o700)
    with pytest.raises(NodeError, match="belongs to another user"):
        FileCache(memory)


def test_a_file_of_more_than_half_of_the_free_disk_is_alone_in_the_cache(
    memory: Root, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1500))
    for name, size in {"a": 700, "b": 900, "c": 1600}.items():
        memory.write_bytes(name, bytes(size))
    files = FileCache(memory, str(tmp_path))
    for name, size in {"a": 700, "b": 900}.items():
        with files.local(name) as path:
            assert path.stat().st_size == size_of(tmp_path) == size
    with pytest.raises(NodeError, match=r"1,600 bytes is larger than the cache of 1,500 bytes"), files.local("c"):
        pass
