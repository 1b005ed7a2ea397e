"""A filter with other settings, and the download after it: scores are in its tables, kept pictures are not fetched."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.download.download import run as run_download
from pipeline.download.shard_update import ShardUpdate
from pipeline.filter.filter import run as run_filter
from pipeline.pictures.tars import picture_reader
from pipeline.recipe import DownloadConfig, FilterConfig
from retrieval.storage.manifest import Manifest, ShardRecord
from retrieval.storage.root import Root
from retrieval.storage.schema import DOWNLOADED, FROM_METADATA, SELECTED, TAR_BYTES, TAR_OFFSET, read_table, sample_key

pytestmark = pytest.mark.usefixtures("in_process_shards")
ROWS = 12
Stored = dict[int, tuple[dict[str, object], bytes]]


@pytest.fixture
def metadata(tmp_path: Path, server) -> Path:
    """Pictures of a server with rising scores; two of them are missing."""
    urls = []
    for n in range(ROWS):
        buffer = io.BytesIO()
        noise = np.random.default_rng(n).integers(0, 255, (16, 16, 3), np.uint8)
        Image.fromarray(noise).save(buffer, "JPEG")
        urls.append(server.send(f"/{n}", buffer.getvalue(), 404 if n in (4, 9) else 200))
    scores = {"similarity": np.arange(ROWS) / ROWS, "AESTHETIC_SCORE": [n % 3 for n in range(ROWS)]}
    columns = {"URL": urls, "TEXT": [f"caption {n}" for n in range(ROWS)], "LANGUAGE": ["en"] * ROWS, **scores}
    columns |= dict.fromkeys(("WIDTH", "HEIGHT"), [16] * ROWS) | dict.fromkeys(("pwatermark", "punsafe"), [0.1] * ROWS)
    pq.write_table(pa.table(columns), tmp_path / "metadata.parquet")
    return tmp_path / "metadata.parquet"


def chain(root: Root, metadata: Path, **settings: object) -> Manifest:
    """Run filter and download."""
    given = {"metadata": str(metadata), "min_edge": 1, "workers": 1, "rows_per_shard": 4}
    run_filter(FilterConfig(**(given | settings)), Root(root.url, remake=True))
    limits = {"timeout_s": 60.0, "deadline_s": 240.0, "retries": 0, "train_min_edge": 1}
    download = DownloadConfig(contact="us@example.org", allow_private="loopback", workers=1, threads=4, **limits)
    return run_download(download, root)


def stored(root: Root, manifest: Manifest) -> Stored:
    """The row and the JPEG of each stored picture, by image id. Its range in the tar is checked and left out."""
    pictures: Stored = {}
    for record in manifest.shards:
        rows = read_table(root, record.file(".parquet"), DOWNLOADED).to_pylist()
        with root.local(record.file(".tar")) as path, picture_reader(path) as read:
            for row in rows:
                offset, size = row.pop(TAR_OFFSET), row.pop(TAR_BYTES)
                if not row["reason"]:
                    jpeg = read(sample_key(row["image_id"]))
                    assert path.read_bytes()[offset : offset + size] == jpeg
                    pictures[row["image_id"]] = row, jpeg
    return pictures


def test_scores_and_language_are_beside_every_picture(tmp_path: Path, metadata: Path) -> None:
    root = Root(tmp_path / "run")
    manifest = chain(root, metadata)
    for record in manifest.shards:
        table = read_table(root, record.file(".parquet"), DOWNLOADED)
        selected = read_table(root, f"filter/{record.shard}.parquet", SELECTED)
        assert table.select(FROM_METADATA).equals(selected.select(FROM_METADATA))
    row, _ = max(stored(root, manifest).values(), key=lambda item: str(item[0]["similarity"]))
    scores = {name: row[name] for name in ("similarity", "aesthetic", "pwatermark", "punsafe", "language")}
    assert scores == pytest.approx(
        {"similarity": 11 / 12, "aesthetic": 2, "pwatermark": 0.1, "punsafe": 0.1, "language": "en"}
    )
    with root.local(manifest.shards[-1].file(".tar")) as path, tarfile.open(path) as tar:
        member = tar.extractfile(f"{sample_key(int(str(row['image_id'])))}.json")
        assert member
        assert json.load(member)["similarity"] == row["similarity"]


SETTINGS = {
    "a higher similarity": {"min_similarity": 0.3},
    "an aesthetic score": {"min_aesthetic": 1.0},
    "half of the URLs": {"sample": 0.5},
    "larger shards": {"rows_per_shard": 5},
    "smaller shards": {"rows_per_shard": 3, "min_similarity": 0.3},
}


@pytest.mark.parametrize("change", SETTINGS)
def test_a_stricter_filter_requests_nothing_and_its_undoing_only_what_was_dropped(
    tmp_path: Path, metadata: Path, server, change: str
) -> None:
    root = Root(tmp_path / "run")
    first = chain(root, metadata)
    before = stored(root, first)
    assert (len(first.shards), len(before)) == (3, 10)
    server.requests.clear()
    second = chain(root, metadata, **SETTINGS[change])
    kept = stored(root, second)
    assert server.paths == []
    assert kept == {image_id: before[image_id] for image_id in kept}
    assert kept
    expected = chain(Root(tmp_path / "new"), metadata, **SETTINGS[change])
    assert sorted(second.checksums().values()) == sorted(expected.checksums().values())
    assert len(root.list("download", ".tar")) == len(second.shards) == len(root.list("download/records"))
    server.requests.clear()
    third = chain(root, metadata)
    assert stored(root, third) == before
    assert len(server.paths) == 12 - sum(record.values["urls"] for record in second.shards)


def test_a_pilot_on_the_first_files_is_part_of_the_larger_run(tmp_path: Path, metadata: Path, server) -> None:
    folder, table = tmp_path / "files", pq.read_table(metadata)
    folder.mkdir()
    for n in range(3):
        pq.write_table(table.slice(4 * n, 4), folder / f"{n}.parquet")
    root = Root(tmp_path / "run")
    chain(root, folder, files="0-1")
    assert len(server.paths) == 8
    server.requests.clear()
    chain(root, folder)
    assert sorted(server.paths) == ["/10", "/11", "/8", "/9"]


def test_files_that_are_added_or_removed_before_known_ones_leave_their_pictures_where_they_are(
    tmp_path: Path, metadata: Path, server
) -> None:
    folder, table = tmp_path / "files", pq.read_table(metadata)
    folder.mkdir()
    for n in (1, 2):
        pq.write_table(table.slice(4 * n, 4), folder / f"{n}.parquet")
    root = Root(tmp_path / "run")
    first = chain(root, folder)
    before = stored(root, first)
    # It repeats a URL of a known file, which stays there.
    pq.write_table(pa.concat_tables([table.slice(0, 4), table.slice(6, 1)]), folder / "0.parquet")
    server.requests.clear()
    second = chain(root, folder)
    assert sorted(server.paths) == ["/0", "/1", "/2", "/3"]
    assert second.shards[:2] == first.shards
    server.requests.clear()
    assert stored(root, chain(root, folder, files="1-2")) == before
    (folder / "1.parquet").unlink()
    chain(root, folder, files="1-1")
    assert server.paths == []


def test_pieces_of_another_size_request_nothing(tmp_path: Path, metadata: Path, server) -> None:
    folder, table = tmp_path / "files", pq.read_table(metadata)
    folder.mkdir()
    pq.write_table(table.slice(0, 8), folder / "0.parquet", row_group_size=2)
    pq.write_table(table.slice(8, 4), folder / "1.parquet", row_group_size=2)
    root = Root(tmp_path / "run")
    before = stored(root, chain(root, folder, rows_per_piece=4, rows_per_shard=2))
    server.requests.clear()
    for rows_per_piece, rows_per_shard, pieces in ((8, 3, {0, 2}), (2, 2, {0, 1, 2, 3, 4, 5}), (4, 2, {0, 1, 2})):
        manifest = chain(root, folder, rows_per_piece=rows_per_piece, rows_per_shard=rows_per_shard)
        assert {int(record.shard[-11:-6]) for record in manifest.shards} == pieces
        assert stored(root, manifest) == before
        assert len(root.list("download", ".tar")) == len(manifest.shards)
    assert server.paths == []


def test_an_update_that_is_killed_between_two_shards_fetches_nothing_again(
    tmp_path: Path, metadata: Path, server, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Root(tmp_path / "run")
    before = stored(root, chain(root, metadata))
    server.requests.clear()
    update = ShardUpdate.__call__

    def killed(self: ShardUpdate, shard: str) -> ShardRecord:
        if shard.endswith("00001"):
            raise KeyboardInterrupt
        return update(self, shard)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ShardUpdate, "__call__", killed)
        chain(root, metadata, min_similarity=0.1)
    # Another change before the update ends.
    kept = stored(root, chain(root, metadata, min_similarity=0.2))
    assert server.paths == []
    assert kept == {image_id: picture for image_id, picture in before.items() if picture[0]["similarity"] >= 0.2}  # type: ignore[operator]
    assert len(root.list("download", ".tar")) == len(root.list("download/records")) == 3


def test_faces_are_blurred_counted_and_blurred_anew_when_their_boxes_change(
    tmp_path: Path, metadata: Path, server
) -> None:
    root = Root(tmp_path / "run")
    plain = stored(root, chain(root, metadata))
    pictures = sorted(plain.values(), key=lambda picture: picture[0]["caption"])
    boxes: list[object] = [None] * ROWS
    boxes[1], boxes[2], boxes[3] = [[0.1, 0.2, 0.6, 0.9]], [[3.0, 4.0, 9.0, 9.0]], []
    table = pq.read_table(metadata)
    kind = pa.list_(pa.list_(pa.float64()))
    pq.write_table(table.append_column("faces", pa.array(boxes, kind)), metadata)
    server.requests.clear()
    manifest = chain(root, metadata, columns={"face_boxes": "faces"})
    blurred = stored(root, manifest)
    assert sorted(path for path, _ in server.requests) == ["/1", "/2"]
    by_caption = {row["caption"]: data for row, data in blurred.values()}
    same = [row["caption"] for row, data in pictures if by_caption.get(row["caption"]) == data]
    assert same == [row["caption"] for row, _ in pictures if row["caption"] not in ("caption 1", "caption 2")]
    assert manifest.reasons["bad_face_boxes"] == 1
    assert manifest.values["with_blurred_faces"] == 1
    assert "caption 1" in by_caption
    assert "caption 2" not in by_caption
