import hashlib
import io
import tarfile
from pathlib import Path

import webdataset
from PIL import Image

from pipeline.pictures.tars import picture_ranges, picture_reader, tar_writer
from retrieval.storage.schema import sample_key


def write(path: Path) -> list[int]:
    """Write two samples. Returns the offsets of their JPEGs."""
    with tar_writer(path) as tar:
        first = tar.add(sample_key(-1), b"\xff\xd8jpeg", "größe\n🖼", {"b": 1, "a": "ü"})
        return [first, tar.add(sample_key(5), b"", "", {})]


def test_a_webp_has_its_suffix_and_is_found_by_its_key(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "WEBP")
    with tar_writer(tmp_path / "a.tar") as tar:
        tar.add("0" * 16, buffer.getvalue(), "a caption", {})
        tar.add("1" * 16, b"\xff\xd8jpeg", "another", {})
    with tarfile.open(tmp_path / "a.tar") as tar:
        assert [name.partition(".")[2] for name in tar.getnames()] == ["webp", "txt", "json", "jpg", "txt", "json"]
    with picture_reader(tmp_path / "a.tar") as read:
        assert (read("0" * 16), read("1" * 16)) == (buffer.getvalue(), b"\xff\xd8jpeg")


def test_equal_samples_give_equal_bytes(tmp_path: Path) -> None:
    write(tmp_path / "a.tar")
    write(tmp_path / "b.tar")
    first, second = (hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() for name in ("a.tar", "b.tar"))
    assert first == second
    with tarfile.open(tmp_path / "a.tar") as tar:
        assert all((m.mtime, m.uid, m.gid, m.uname) == (0, 0, 0, "") for m in tar)


def test_a_tar_has_the_bytes_that_tarfile_writes(tmp_path: Path) -> None:
    write(tmp_path / "a.tar")
    with (
        tarfile.open(tmp_path / "a.tar") as tar,
        tarfile.open(tmp_path / "b.tar", "w", format=tarfile.USTAR_FORMAT) as b,
    ):
        for member in tar:
            same = tarfile.TarInfo(member.name)
            same.size = member.size
            b.addfile(same, tar.extractfile(member))
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()


def test_webdataset_reads_the_samples_in_order(tmp_path: Path) -> None:
    write(tmp_path / "a.tar")
    samples = list(webdataset.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == ["f" * 16, "0" * 15 + "5"]
    assert samples[0]["jpg"] == b"\xff\xd8jpeg"
    assert samples[0]["txt"].decode() == "größe\n🖼"
    assert samples[0]["json"] == '{"a": "ü", "b": 1}'.encode()


def test_members_are_read_by_their_range_and_by_their_key(tmp_path: Path) -> None:
    offsets = write(tmp_path / "a.tar")
    assert offsets == [first for first, _ in picture_ranges(tmp_path / "a.tar").values()]
    offset, size = picture_ranges(tmp_path / "a.tar")["f" * 16]
    file = io.BytesIO((tmp_path / "a.tar").read_bytes())
    file.seek(offset)
    assert file.read(size) == b"\xff\xd8jpeg"
    with picture_reader(tmp_path / "a.tar") as read:
        assert (read("0" * 15 + "5"), read("f" * 16)) == (b"", b"\xff\xd8jpeg")
