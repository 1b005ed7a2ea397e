import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipeline.web.blocklist import read_blocklist
from retrieval.errors import UserError
from retrieval.storage.schema import image_id

URL = "http://example.org/a.jpg"


def test_a_list_blocks_urls_ids_domains_and_subdomains(tmp_path: Path) -> None:
    other = image_id("http://example.org/b.jpg")
    third = image_id("http://example.org/c.jpg")
    lines = [
        "# requested by mail",
        "",
        "HTTP://EXAMPLE.org/a.jpg#x",
        f"{other & (2**64 - 1):016x}",
        str(third),
        "Blocked.example",
    ]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    blocklist = read_blocklist(str(tmp_path / "list.txt"))
    ids = np.array([image_id(URL), other, third, image_id("http://example.org/d.jpg")])
    assert blocklist.blocks_ids(ids).tolist() == [True, True, True, False]
    urls = pa.array(
        [
            "http://blocked.example/",
            "https://img.blocked.example:8080/a",
            "http://notblocked.example/",
            "http://a.org/blocked.example/",
        ]
    )
    assert blocklist.blocks_hosts(urls).tolist() == [True, True, False, False]


def test_contents_and_pictures_are_listed_by_their_hashes(tmp_path: Path) -> None:
    lines = [f"MD5:{hashlib.md5(b'one').hexdigest()}", f"sha256:{hashlib.sha256(b'two').hexdigest()}"]
    (tmp_path / "list.txt").write_text("\n".join([*lines, "phash:f000000000000001"]))
    blocklist = read_blocklist(str(tmp_path / "list.txt"))
    assert [blocklist.blocks_content(body) for body in (b"one", b"two", b"three")] == [True, True, False]
    listed = np.array([0xF000000000000001], np.uint64)
    flips = np.array([0, 0b111111 << 20, 0b1111111 << 20], np.uint64)
    hashes = (listed ^ flips).view(np.int64)
    assert blocklist.blocks_phashes(hashes).tolist() == [True, True, False]
    assert not blocklist.blocks_ids(hashes).any()


def test_an_absent_list_blocks_nothing() -> None:
    assert not read_blocklist("").blocks_ids(np.array([1, 2])).any()


def test_an_invalid_line_is_reported_with_its_number(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("example.org\nwhat is this\n")
    with pytest.raises(UserError, match=r"line 2: 'what is this'"):
        read_blocklist(str(tmp_path / "list.txt"))


def test_a_missing_list_is_an_error_and_not_an_empty_list(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"filter\.blocklist"):
        read_blocklist(str(tmp_path / "absent.txt"))
