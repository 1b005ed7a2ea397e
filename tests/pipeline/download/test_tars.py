import hashlib
import io
import tarfile
from pathlib import Path

import webdataset

from pipeline.download import tars


def write(path: Path) -> None:
    with tars.writing(path) as tar:
        tar.add(tars.key_of(-1), b"\xff\xd8jpeg", "größe\n🖼", {"b": 1, "a": "ü"})
        tar.add(tars.key_of(5), b"", "", {})


def test_a_tar_is_the_same_whenever_it_is_written(tmp_path: Path) -> None:
    write(tmp_path / "a.tar")
    write(tmp_path / "b.tar")
    first, second = (
        hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() for name in ("a.tar", "b.tar")
    )
    assert first == second
    with tarfile.open(tmp_path / "a.tar") as tar:
        assert all((m.mtime, m.uid, m.gid, m.uname) == (0, 0, 0, "") for m in tar)


def test_webdataset_reads_the_samples_in_order(tmp_path: Path) -> None:
    write(tmp_path / "a.tar")
    samples = list(webdataset.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == ["f" * 16, "0" * 15 + "5"]
    assert samples[0]["jpg"] == b"\xff\xd8jpeg"
    assert samples[0]["txt"].decode() == "größe\n🖼"
    assert samples[0]["json"] == '{"a": "ü", "b": 1}'.encode()


def test_places_lead_to_the_bytes(tmp_path: Path) -> None:
    write(tmp_path / "a.tar")
    offset, size = tars.places(tmp_path / "a.tar", ".jpg")["f" * 16]
    file = io.BytesIO((tmp_path / "a.tar").read_bytes())
    file.seek(offset)
    assert file.read(size) == b"\xff\xd8jpeg"
