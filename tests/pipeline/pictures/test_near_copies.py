"""Near copies: after any change of the download the search gives the files of a first one, comparing only changes."""

import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipeline.pictures import near_copies, near_copy_shards
from pipeline.pictures.near_copies import Hashes, find_copies
from pipeline.pictures.near_copy_shards import pending_comparisons
from pipeline.runtime.id_files import erased_ids, store_erased
from pipeline.runtime.workers import Workers
from retrieval import Root
from retrieval.storage.manifest import read_manifest
from retrieval.storage.schema import IMAGE_ID, image_id, read_table
from tests.killed_writes import kill_at
from tests.pipeline.conftest import Picture, write_download

BITS = 6
Shards = dict[str, list[Picture]]


def picture(name: str, random: np.random.Generator) -> Picture:
    """One of few contents and of few similar perceptual hashes, so many are copies."""
    flipped = random.choice(62, random.integers(0, 9), replace=False)
    phash = int(random.integers(1, 5)) * 0x0123456789ABCDE ^ sum(1 << int(bit) for bit in flipped)
    return Picture(f"http://example.org/{name}.jpg", int(random.integers(1, 40)) << 200, phash=phash)


def random_shards(random: np.random.Generator) -> Shards:
    return {
        f"{split}/{number:05d}": [picture(f"{split}/{number}/{row}", random) for row in range(rows)]
        for split, rows in (("train", 3), ("database", 12))
        for number in range(4)
    }


def changed(shards: Shards, number: int, random: np.random.Generator) -> Shards:
    """The same download with another change for each number."""
    shard, other = (sorted(shards)[i] for i in random.permutation(len(shards))[:2])
    rows = shards[shard]
    match number % 6:
        case 0:
            return {**shards, shard: [*rows, picture(f"added/{number}", random)]}
        case 1:
            return {**shards, shard: [replace(row, reason="not_found") if row in rows[:1] else row for row in rows]}
        case 2:
            return {**shards, shard: [replace(row, reason="") for row in rows], other: shards[other][1:]}
        case 3:
            return {**shards, shard: rows[:-1], f"{shard.partition('/')[0]}/00009": rows[-1:]}
        case 4:
            return {name: rows for name, rows in shards.items() if name != shard}
    return {**shards, shard: [replace(row, seed=picture("", random).seed) for row in rows]}


def search(root: Root, shards: Shards) -> dict[str, str]:
    write_download(root, shards)
    return find_copies(root, read_manifest(root, "download"), BITS, Workers(1))


def files(root: Root) -> dict[str, bytes | None]:
    names = [name for name in root.list("near_copies") if "/records/" not in name]
    return {name: root.read_bytes(name) for name in names}


@pytest.fixture
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near_copy_shards, "ROWS_PER_GROUP", 25)
    monkeypatch.setattr(near_copy_shards, "CHANGED_SHARDS", 2)


@pytest.mark.usefixtures("in_process_shards", "small_groups")
@pytest.mark.parametrize("seed", range(2))
def test_after_any_change_the_files_equal_those_of_a_first_search(tmp_path: Path, seed: int) -> None:
    random = np.random.default_rng(seed)
    root, shards, numbers = Root(tmp_path / "run"), random_shards(random), []
    for number in range(12):
        copies = search(root, shards)
        new = Root(tmp_path / f"new-{number}")
        assert copies == search(new, shards)
        assert files(root) == files(new)
        numbers.append(sum(root.size(f"near_copies/{name}.json") > 3 for name in set(copies.values())))
        shards = changed(shards, number, random)
    assert any(numbers)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Numbers of images and of the others that they are compared with, of each comparison from now on."""
    counts: list[tuple[int, int]] = []
    mark = near_copies._mark

    def counting(kinds: near_copies.Kinds, images: Hashes, rows: near_copies.Rows, others: Hashes, bits: int) -> None:
        counts.append((len(rows), len(others.contents)))
        mark(kinds, images, rows, others, bits)

    monkeypatch.setattr(near_copies, "_mark", counting)
    return counts


@pytest.mark.usefixtures("in_process_shards")
def test_only_changes_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def distinct(name: str, first: int, count: int) -> list[Picture]:
        return [Picture(f"http://example.org/{name}/{i}.jpg", i << 200) for i in range(first, first + count)]

    root = Root(tmp_path)
    shards = {"train/00000": distinct("train", 1, 5), "train/00001": distinct("train", 10, 5)}
    shards |= {"database/00000": distinct("database", 100, 20), "database/00001": distinct("database", 200, 20)}
    shards["database/00000"][3] = replace(shards["database/00000"][3], seed=shards["train/00000"][2].seed)
    search(root, shards)
    counts = counted(monkeypatch)
    search(root, shards)
    assert counts == []

    retried = {**shards, "train/00001": [*shards["train/00001"], *distinct("retried", 200, 1)]}
    assert search(root, retried)
    assert counts == [(1, 0), (40, 1)], "one copy with nothing lost, all images with the gained picture"
    counts.clear()

    removed = {**retried, "train/00000": [p for i, p in enumerate(shards["train/00000"]) if i != 2]}
    search(root, removed)
    assert counts == [(2, 1), (39, 0), (1, 10)], "two copies with the lost picture, one of them with all that remain"
    counts.clear()

    write_download(root, {**removed, "database/00001": distinct("database", 200, 21)})
    download = read_manifest(root, "download")
    pending = "near copies: compares the new images of 1 changed database shard with all training images"
    assert pending_comparisons(root, download, BITS) == pending
    assert "all database images are compared" in pending_comparisons(root, download, BITS - 1)
    [name] = set(find_copies(root, download, BITS, Workers(1)).values())
    assert counts == [(1, 10)], "the new image with all training images"
    copies = near_copies.schema.read_table(root, f"near_copies/{name}.parquet", near_copies.COPIES)
    assert copies.to_pydict() == {
        "image_id": [image_id("http://example.org/database/200.jpg")],
        "reason": ["duplicate_content"],
    }


@pytest.mark.usefixtures("in_process_shards")
def test_copies_of_erased_images_stay_copies_and_those_of_other_lost_images_do_not(tmp_path: Path) -> None:
    root = Root(tmp_path)
    erased, lost, kept = (Picture(f"http://example.org/train/{i}.jpg", i << 200) for i in (1, 2, 3))
    copies = [Picture(f"http://example.org/copy/{i}.jpg", i << 200) for i in (1, 2, 3, 4)]
    ids = [image_id(copy.url) for copy in copies]
    search(root, {"train/00000": [erased, lost, kept], "database/00000": copies})
    remaining = {"train/00000": [kept], "database/00000": copies}
    write_download(root, remaining)
    download = read_manifest(root, "download")
    store_erased(root, np.array([image_id(erased.url)]))
    for bits in (BITS, BITS, BITS - 1):  # the last search compares everything again
        [name] = set(find_copies(root, download, bits, Workers(1)).values())
        listed = read_table(root, f"near_copies/{name}.parquet", near_copies.COPIES)
        assert listed[IMAGE_ID].to_pylist() == [ids[0], ids[2]]
    assert erased_ids(root).tolist() == sorted([image_id(erased.url), ids[0]])


@pytest.mark.usefixtures("in_process_shards")
def test_a_missing_file_makes_all_comparisons_again(tmp_path: Path) -> None:
    root, shards = Root(tmp_path), random_shards(np.random.default_rng(5))
    search(root, shards)
    before = files(root)
    for name in before:
        if "/hashes/" in name:
            root.delete(name)
    search(root, shards)
    assert files(root) == before


@pytest.mark.usefixtures("in_process_shards", "small_groups")
def test_one_file_of_changes_is_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    root, shards = Root(tmp_path), random_shards(random)
    search(root, shards)
    events: list[str] = []
    read, mark = near_copies.read_batch, near_copies._mark

    def reading(root: Root, name: str, number: int) -> pa.RecordBatch:
        events.append(name)
        return read(root, name, number)

    def marking(*arguments: Any) -> None:
        events.append("compared")
        mark(*arguments)

    monkeypatch.setattr(near_copies, "read_batch", reading)
    monkeypatch.setattr(near_copies, "_mark", marking)
    train = {shard: rows for shard, rows in shards.items() if shard.startswith("train/")}
    search(root, shards | {shard: [*rows[1:], picture(shard, random)] for shard, rows in train.items()})
    following = [then for event, then in pairwise(events) if "/changes/" in event]
    assert len(following) == 2 * 2 * 2, "gained and lost of two files, for each of two database groups"
    assert {*following} == {"compared"}


@pytest.mark.usefixtures("in_process_shards", "small_groups")
def test_a_search_that_is_killed_at_any_write_gives_the_files_of_an_undisturbed_one(tmp_path: Path) -> None:
    random = np.random.default_rng(3)
    before = {shard: rows for shard, rows in random_shards(random).items() if shard[-1] in "01"}
    after = {**before, **{f"{split}/00000": before[f"{split}/00001"][1:] for split in ("train", "database")}}
    after["train/00002"] = before["train/00000"]
    first, undisturbed = Root(tmp_path / "first"), Root(tmp_path / "undisturbed")
    search(first, before)
    write_download(first, after)
    expected = search(undisturbed, after)
    download = read_manifest(first, "download")
    number, is_finished = 0, False
    while not is_finished:
        root = Root(shutil.copytree(first.url, tmp_path / str(number)))
        with pytest.MonkeyPatch.context() as patch:
            kill_at(patch, number)
            try:
                find_copies(root, download, BITS, Workers(1))
                is_finished = True
            except KeyboardInterrupt:
                shutil.rmtree(f"{root.url}/leases")  # that of an ended process would be taken over
        assert find_copies(root, download, BITS, Workers(1)) == expected
        assert files(root) == files(undisturbed)
        assert root.list("near_copies") == undisturbed.list("near_copies")
        number += 1
    assert number > 12
